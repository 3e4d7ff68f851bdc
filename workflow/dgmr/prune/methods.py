"""The ways to order a block's hidden units, all behind one call.

A method is a function of a :class:`Block`, of how far the order must reach and of a seed. Whatever
it looks at (weights, calibration inputs, scores made for the whole model) it asks the block for.
``gains`` say what each unit is worth to the method, as a fraction of what all units are worth.

a_j: activation of hidden unit j, what enters fc2; M: hidden units; N: outputs of the MLP.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dgmr.fingerprint import key
from dgmr.prune.block import Block
from dgmr.prune.gram_schmidt import gram_schmidt as gram_schmidt_on
from dgmr.prune.greedy import select

# A unit fires where its activation is above this fraction of its root mean square.
_FIRING = 0.01
_PANEL = 2048


class Order(NamedTuple):
    """Hidden units in the order in which they are kept: any width is a slice."""

    indices: Tensor
    """``[width]`` int64; no index twice."""
    gains: Tensor
    """``[width]`` float64."""


class Request(NamedTuple):
    """How an order is wanted."""

    width: int
    """How far it must reach."""
    seed: int = 0
    tokens: int | None = None
    """Calibration tokens to look at, at most; None: all."""


def gram_schmidt(block: Block, request: Request) -> Order:
    """DGMR's: Gram-Schmidt on the rows of the first layer (Shen et al., arXiv 2506.08591, section 3).

    A gain is a squared residual norm.
    """
    vectors = block.vectors()
    indices, norms = gram_schmidt_on(vectors, request.width)
    return _order(indices, norms.square(), float(_squared_norms(vectors).sum()))


def activation_gram_schmidt(block: Block, request: Request) -> Order:
    """Gram-Schmidt on the activations, each scaled by the norm of its column of fc2.

    A gain is a residual variance.
    """
    gram, fc2 = _gram(block, request)
    norms = fc2.norm(dim=0)
    gram.mul_(norms).mul_(norms[:, None])
    return _order(*select(gram, None, request.width), float(gram.trace()))


def output_gram_schmidt(block: Block, request: Request) -> Order:
    """Orthogonal least squares on the MLP's output: see :mod:`dgmr.prune.greedy`.

    A gain is the variance of the output that the unit explains beyond those before it.
    """
    gram, fc2 = _gram(block, request)
    cross = gram @ fc2.T
    return _order(*select(gram, cross, request.width), float((cross * fc2.T).sum()))


def magnitude(block: Block, request: Request) -> Order:
    """The units whose rows of the first layer have the largest L2 norm; a gain is its square."""
    return _largest(_squared_norms(block.vectors()), request)


def active_energy(block: Block, request: Request) -> Order:
    """E[a_j^2] times how often unit j fires, as CORP ranks (arXiv 2602.05243)."""
    mlp = block.mlp()

    def mean(value: Callable[[Tensor], Tensor]) -> Tensor:
        total, count = torch.zeros(mlp.hidden_features, dtype=torch.double), 0
        for inputs, _ in block.inputs(request.tokens):
            total += value(mlp.hidden(inputs).square()).double().sum(0)
            count += len(inputs)
        return total / count

    energy = mean(lambda squares: squares)
    fires = mean(lambda squares: squares > _FIRING**2 * energy)
    return _largest(energy * fires, request)


def taylor(block: Block, request: Request) -> Order:
    """The units whose removal moves the features most, to second order: see :mod:`dgmr.prune.saliency`."""
    return _largest(block.saliency(), request)


def random(block: Block, request: Request) -> Order:
    """Without replacement, by seed and block; all gain alike."""
    units = block.skeleton.hidden_features
    seed = int(key(request.seed, block.name), 16)
    indices = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    return Order(indices[: request.width], torch.full((request.width,), 1 / units).double())


METHODS: dict[str, Callable[[Block, Request], Order]] = {
    method.__name__: method
    for method in (
        gram_schmidt,
        activation_gram_schmidt,
        output_gram_schmidt,
        magnitude,
        active_energy,
        taylor,
        random,
    )
}
"""By the name that ``prune.method`` has in ``params.yaml``."""


def _gram(block: Block, request: Request) -> tuple[Tensor, Tensor]:
    """The activations' Gram matrix ``[M, M]`` over calibration tokens, and fc2's weight ``[N, M]``.

    Float64 sums of float32 products, a panel of the lower triangle at a time. Centred where fc2 has
    a bias, which then carries the means.
    """
    mlp = block.mlp()
    units = mlp.hidden_features
    gram = torch.zeros(units, units, dtype=torch.double)
    total, count = torch.zeros(units, dtype=torch.double), 0
    panels = [(start, min(start + _PANEL, units)) for start in range(0, units, _PANEL)]
    for inputs, _ in block.inputs(request.tokens):
        hidden = mlp.hidden(inputs)
        for start, end in panels:
            gram[start:end, :end] += hidden[:, start:end].T @ hidden[:, :end]
        total += hidden.double().sum(0)
        count += len(hidden)
    if not gram.diagonal().isfinite().all():
        raise ValueError("holds NaN or infinity")
    for start, end in panels:
        gram[:start, start:end] = gram[start:end, :start].T
        square = gram[start:end, start:end]
        square.copy_(square.tril() + square.tril(-1).T)
    if mlp.has_bias:
        gram.addr_(total, total, alpha=-1 / count)
    return gram, mlp.module.fc2.weight.double()


def _squared_norms(vectors: Tensor) -> Tensor:
    return torch.cat([rows.double().square().sum(1) for rows in vectors.split(_PANEL)])


def _largest(scores: Tensor, request: Request) -> Order:
    """By falling score; the lower index first where two are the same."""
    if not scores.isfinite().all():
        raise ValueError("holds NaN or infinity")
    gains, indices = scores.double().sort(descending=True, stable=True)
    return _order(indices[: request.width], gains[: request.width], float(scores.sum()))


def _order(indices: Tensor, gains: Tensor, all_gains: float) -> Order:
    return Order(indices, gains / max(all_gains, torch.finfo(torch.double).tiny))
