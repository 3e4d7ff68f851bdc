"""Which hidden units to keep: greedy Gram-Schmidt on the rows of the first MLP weight.

Shen et al., arXiv 2506.08591, section 3. Within a round this is column-pivoted QR of the weight's
transpose.

The plain loop subtracts a rank-1 projection from every row for each row that it takes. Here the same
rows are taken in blocks. Residual norms never grow, so a stale norm is an upper bound: a pool of the
rows with the largest norms is enough to go on picking, by pivoted Cholesky on inner products within
the pool, for as long as the best of the pool surely beats every row outside it. Then the block's
directions are orthonormalised, and one matrix product brings the norms of all rows up to date.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# Only the rows that lead the pool may be taken, as the others' Gram rows would cost more than they help.
_POOL, _HEAD = 512, 160


class Order(NamedTuple):
    """Rows in greedy order, and how much diversity each still added."""

    indices: Tensor
    """``[width]`` int64; no index twice; the first k are the selection for width k."""
    residual_norms: Tensor
    """``[width]`` float64: the L2 norm of a row less its projection on those its round took before."""


class _Limits(NamedTuple):
    floor: float
    """Relative to the round's first maximum, as is ``tie``."""
    tie: float
    refresh: float
    """Squared norms that are kept up to date by subtraction lose digits as they shrink. Below this
    fraction of the largest norm they were last computed from, they are computed anew: till then a
    norm is known to about eps / (2 refresh) of that largest, far better than it must be."""


_LIMITS = {
    torch.float64: _Limits(floor=1e-10, tie=1e-12, refresh=0.01),
    torch.float32: _Limits(floor=1e-5, tie=1e-6, refresh=0.2),
}


def gram_schmidt_order(weight: Tensor, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Indices of the ``width`` most diverse rows of ``weight`` ``[M, N]``, in greedy order.

    A round repeatedly takes the row with the largest residual norm and subtracts from every
    residual its projection on the taken one. It ends after N rows, or when the largest residual
    norm falls under 1e-10 of the round's first; the next round starts on the rows not yet taken,
    with their original weights. A round that takes none takes the rest by index. Norms within
    1e-12 of the round's first maximum of each other tie, and the lowest index wins.

    Computed in ``dtype``, on the weight's device. float32 is for devices without float64: there a
    round ends under 1e-5, norms within 1e-6 tie, and every row taken is the largest to within 1e-5,
    all of the round's first maximum.

    Returns:
        LongTensor ``[width]`` on the CPU.

    Raises:
        ValueError: ``weight`` is no matrix, has fewer rows than ``width``, or holds NaN, infinity or
            a number too large to square; or ``dtype`` is another.
    """
    return gram_schmidt(weight, width, dtype=dtype).indices


def gram_schmidt(weight: Tensor, width: int, *, dtype: torch.dtype = torch.float64) -> Order:
    """As :func:`gram_schmidt_order`, with the residual norms."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix [M, N], not {list(weight.shape)}")
    if not 0 <= width <= len(weight):
        raise ValueError(f"width {width} must be between 0 and the {len(weight)} rows of weight")
    if dtype not in _LIMITS:
        raise ValueError(f"dtype must be torch.float64 or torch.float32, not {dtype}")
    weight = weight.detach()
    remaining = np.arange(len(weight))
    indices = [remaining[:0]]
    norms = [np.empty(0)]
    wanted = width
    while wanted > 0:
        rows = weight if len(remaining) == len(weight) else weight[_at(remaining, weight)]
        taken, taken_norms = _Round(rows, dtype).run(wanted)
        if len(taken) == 0:
            taken, taken_norms = np.arange(wanted), np.zeros(wanted)
        indices.append(remaining[taken])
        norms.append(taken_norms)
        remaining = np.delete(remaining, taken)
        wanted -= len(taken)
    return Order(torch.from_numpy(np.concatenate(indices)), torch.from_numpy(np.concatenate(norms)))


class _Round:
    """One round on ``rows`` ``[m, N]``.

    The residuals are ``base - coefficients @ directions``, with ``rank`` orthonormal directions so
    far. Squared residual norms ``[m]`` are on the CPU; those of taken rows stand at -1.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.limits = _LIMITS[dtype]
        self.base = rows.to(dtype)
        self.is_copy = self.base is not rows
        m, n = rows.shape
        self.directions = self.base.new_empty(min(m, n), n)
        self.coefficients = self.base.new_empty(m, min(m, n))
        self.rank = 0
        self.taken: list[int] = []
        self.norms: list[float] = []
        self.squares = self._computed_squares()
        self.first = self.scale = self._largest()
        if not np.isfinite(self.first):
            raise ValueError(f"weight holds NaN or infinity, or a number too large for {dtype}")

    def run(self, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Take up to ``most`` rows: their positions and residual norms."""
        most = min(most, *self.base.shape)
        while len(self.taken) < most:
            if self.rank and self._largest() < self.limits.refresh * self.scale:
                self._refresh()
            if self._largest() <= self.limits.floor * self.first:
                break
            self._take_block(most - len(self.taken))
        return np.array(self.taken, dtype=np.int64), np.array(self.norms)

    def _largest(self) -> float:
        return float(np.sqrt(self.squares.max(initial=0.0)))

    def _computed_squares(self) -> NDArray[np.float64]:
        norms = torch.linalg.vector_norm(self.base, dim=1).cpu().double()
        squares: NDArray[np.float64] = norms.square().numpy()
        squares[self.taken] = -1.0
        return squares

    def _refresh(self) -> None:
        """Make the residuals the new base, and compute their norms anew."""
        coefficients, directions = self.coefficients[:, : self.rank], self.directions[: self.rank]
        self.base = self.base if self.is_copy else self.base.clone()
        self.base.addmm_(coefficients, directions, alpha=-1)
        self.is_copy, self.rank = True, 0
        self.squares = self._computed_squares()
        self.scale = self._largest()

    def _take_block(self, most: int) -> None:
        pool, bound = self._pool()
        chosen, norms = self._picks(pool, bound, most)
        self._project_out(pool[chosen])
        self.taken += pool[chosen].tolist()
        self.norms += norms
        self.squares[self.taken] = -1.0

    def _pool(self) -> tuple[NDArray[np.int64], float]:
        """The next row, then those with the largest norms, the head first; a bound of the others'.

        Rows are by position.
        """
        norms = np.sqrt(np.maximum(self.squares, 0.0))
        # argmax of a boolean array is the lowest position that ties.
        next_row = (norms >= norms.max() - self.limits.tie * self.first).argmax()
        ranked = self.squares.copy()
        ranked[next_row] = np.inf
        size = min(_POOL, len(ranked))
        order = np.argpartition(-ranked, (0, min(_HEAD, size) - 1, size - 1))
        pool = order[:size]
        return pool[self.squares[pool] >= 0], float(norms[order[size:]].max(initial=-1.0))

    def _picks(
        self, pool: NDArray[np.int64], bound: float, most: int
    ) -> tuple[list[int], list[float]]:
        """Pivoted Cholesky on the pool, as far as its head surely holds the next row.

        Returns positions within the pool in greedy order, and their residual norms.
        """
        gram = self._residual_gram(pool)
        squares = self.squares[pool]
        columns = np.empty((min(most, len(gram)), len(pool)))
        chosen: list[int] = []
        norms: list[float] = []
        tie = self.limits.tie * self.first
        least = max(bound, self.limits.refresh * self.scale, self.limits.floor * self.first)
        pick = 0
        while pick < len(gram):
            pivot = np.sqrt(squares[pick])
            k = len(chosen)
            columns[k] = (gram[pick] - columns[:k, pick] @ columns[:k]) / pivot
            squares -= np.square(columns[k])
            chosen.append(pick)
            norms.append(float(pivot))
            squares[chosen] = -1.0
            best = np.sqrt(squares.max(initial=0.0))
            if len(chosen) == len(columns) or best - tie <= least:
                break
            tied = np.flatnonzero(squares >= max(best - tie, 0.0) ** 2)
            pick = int(tied[pool[tied].argmin()])
        return chosen, norms

    def _residual_gram(self, pool: NDArray[np.int64]) -> NDArray[np.float64]:
        """Inner products of the residuals of the head with those of the pool."""
        at = _at(pool, self.base)
        rows, coefficients = self.base[at], self.coefficients[at, : self.rank]
        gram = rows[:_HEAD] @ rows.T - coefficients[:_HEAD] @ coefficients.T
        products: NDArray[np.float64] = gram.cpu().double().numpy()
        return products

    def _project_out(self, positions: NDArray[np.int64]) -> None:
        """Add the directions of these rows, and subtract the projections on them from all norms."""
        at, k = _at(positions, self.base), self.rank
        before = self.directions[:k]
        residuals = self.base[at] - self.coefficients[at, :k] @ before
        # On the CPU, as not every device has QR.
        new = torch.linalg.qr(residuals.T.cpu()).Q.T.to(before)
        new = F.normalize(new - (new @ before.T) @ before, dim=1)  # what rounding left of them
        self.rank = k + len(positions)
        self.directions[k : self.rank] = new
        # MKL takes up to three times as long the other way round, and twice if not in fours.
        coefficients = (F.pad(new, (0, 0, 0, -len(new) % 4)) @ self.base.T)[: len(new)]
        self.coefficients[:, k : self.rank] = coefficients.T
        self.squares -= coefficients.square().sum(0).cpu().double().numpy()
        np.maximum(self.squares, 0.0, out=self.squares)


def _at(positions: NDArray[np.int64], rows: Tensor) -> Tensor:
    """Positions as an index of ``rows``, on its device."""
    return torch.from_numpy(positions).to(rows.device)
