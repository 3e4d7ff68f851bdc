"""The pruned model: built by timm, with the kept hidden units' weights."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dgmr.errors import DgmrError
from dgmr.loader import fit
from dgmr.mlps import PrunableMlp, mlps, widths
from dgmr.models import TimmModel, like
from dgmr.prune.gram_schmidt import gram_schmidt_order


class Refit(NamedTuple):
    """fc2 for the kept hidden units."""

    weight: Tensor
    """``[N, k]``."""
    bias: Tensor | None
    """``[N]``; None where the dense fc2 has none."""


def prune_model(
    model: TimmModel,
    ratio: float | None = None,
    *,
    hidden_features: Mapping[str, int] | None = None,
    orders: Mapping[str, Tensor] | None = None,
    refits: Mapping[str, Refit] | None = None,
) -> TimmModel:
    """A new timm model with fewer hidden units in every MLP of ``model``.

    Args:
        model: made by ``timm.create_model``; it is left as it is.
        ratio: keep ``int(ratio * N)`` hidden units of every MLP, N being its embed dim.
        hidden_features: or, by MLP, how many to keep.
        orders: by MLP, indices in greedy order, at least as many as are kept; Gram-Schmidt on the
            weights where not given.
        refits: by MLP, the compensated fc2 for exactly those units; plain slices where not given.

    Raises:
        DgmrError: a width is impossible.
        ValueError: neither or both of ``ratio`` and ``hidden_features`` are given.
    """
    found = mlps(model)
    if (ratio is None) == (hidden_features is None):
        raise ValueError("give either ratio or hidden_features")
    if ratio is not None:
        hidden_features = {name: int(ratio * mlp.in_features) for name, mlp in found.items()}
    assert hidden_features is not None
    check_widths(found, hidden_features)
    kept = {}
    for name, mlp in found.items():
        width = hidden_features[name]
        if width == mlp.hidden_features:
            continue
        if orders is None:
            vectors = mlp.vectors(mlp.module.state_dict())
            kept[name] = gram_schmidt_order(vectors, width)
        else:
            kept[name] = orders[name][:width]
    student = build(model, hidden_features).to(next(model.parameters()))
    student.load_state_dict(
        dict(pruned_tensors(model.state_dict().items(), found, kept, refits or {}))
    )
    return student.train(model.training)


def pruned_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    found: Mapping[str, PrunableMlp],
    kept: Mapping[str, Tensor],
    refits: Mapping[str, Refit],
) -> Iterator[tuple[str, Tensor]]:
    """The pruned model's tensors by name, from the dense model's as they come.

    ``kept`` indices of hidden units and ``refits`` are by MLP.
    """
    for name, tensor in tensors:
        module, key = _split(name, found)
        if module in refits and key in ("fc2.weight", "fc2.bias"):
            refitted = refits[module].weight if key == "fc2.weight" else refits[module].bias
            assert refitted is not None
            yield name, refitted.to(tensor)
        elif module in kept:
            yield name, found[module].sliced({key: tensor}, kept[module].to(tensor.device))[key]
        else:
            yield name, tensor


def _split(name: str, modules: Mapping[str, object]) -> tuple[str, str]:
    """A tensor's module among ``modules`` and its name in it; two empty names where there is none."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        module = ".".join(parts[:count])
        if module in modules:
            return module, ".".join(parts[count:])
    return "", ""


def build(model: TimmModel, hidden_features: Mapping[str, int]) -> TimmModel:
    """An untrained timm model like ``model`` whose MLPs have these hidden units, by name.

    It is built with an ``mlp_ratio`` where one gives all those widths, so that timm can build it
    again from its arguments; else with the dense model's arguments, and then fitted.
    """
    found = mlps(model)
    for packed in (1, 2):  # timm counts gate and value of a packed MLP as hidden features
        wanted = [(packed * hidden_features[name], mlp.in_features) for name, mlp in found.items()]
        # timm builds int(mlp_ratio * dim).
        low = max(width / dim for width, dim in wanted)
        high = min((width + 1) / dim for width, dim in wanted)
        exact = all(int(low * dim) == width for width, dim in wanted)
        mlp_ratio = low if exact else (low + high) / 2
        if low < high and _gives(model, mlp_ratio, hidden_features):
            return like(model, mlp_ratio=mlp_ratio)
    student = like(model)
    index = {name: torch.zeros(width, dtype=torch.long) for name, width in hidden_features.items()}
    dense = ((key, tensor.to("meta")) for key, tensor in model.state_dict().items())
    fit(student, {key: list(t.shape) for key, t in pruned_tensors(dense, found, index, {})})
    return student


def _gives(model: TimmModel, mlp_ratio: float, hidden_features: Mapping[str, int]) -> bool:
    """Whether timm builds those widths with this ``mlp_ratio``."""
    try:
        with torch.device("meta"):
            return widths(like(model, mlp_ratio=mlp_ratio)) == dict(hidden_features)
    except (AssertionError, RuntimeError, TypeError):  # no such argument, or an odd packed width
        return False


def check_widths(found: Mapping[str, PrunableMlp], hidden_features: Mapping[str, int]) -> None:
    """Refuse widths that leave an MLP empty or ask for more hidden units than it has.

    Raises:
        DgmrError: naming the MLP, the width and the allowed range.
    """
    for name, mlp in found.items():
        width = hidden_features[name]
        if not 1 <= width <= mlp.hidden_features:
            raise DgmrError(
                f"prune: {name} would keep {width} hidden units, but it has {mlp.hidden_features}"
                f" ({mlp.hidden_features / mlp.in_features:g} times its embed dim): choose a width"
                f" from 1 to {mlp.hidden_features}."
            )
