"""Which hidden neurons to keep: greedy Gram-Schmidt on the rows of the first MLP weight.

Shen et al., arXiv 2506.08591, section 3. Within a round this is column-pivoted QR of the weight's
transpose.

The plain loop subtracts a rank-1 projection from every row for each row that it takes. Here the same
rows are taken in blocks. Residual norms never grow, so a stale norm is an upper bound: a pool of the
rows with the largest norms is enough to go on picking, by pivoted Cholesky on the pool's small Gram
matrix, for as long as the best of the pool surely beats every row outside it. Then the block's
directions are orthonormalised, and one matrix product brings the norms of all rows up to date.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# Both relative to the round's first maximum.
FLOOR = 1e-10
TIE = 1e-12
# Squared norms that are kept up to date by subtraction lose digits as they shrink. Below this
# fraction of the largest norm they were last computed from, residuals are formed and norms taken anew.
_REFRESH = 0.05
_POOL = 256


class Order(NamedTuple):
    """Rows in greedy order, and how much diversity each still added."""

    indices: Tensor
    """``[width]`` int64; no index twice; the first k are the selection for width k."""
    residual_norms: Tensor
    """``[width]`` float64: the L2 norm of a row less its projection on those its round took before."""


def gram_schmidt_order(weight: Tensor, width: int) -> Tensor:
    """Indices of the ``width`` most diverse rows of ``weight`` ``[M, N]``, in greedy order.

    A round repeatedly takes the row with the largest residual norm and subtracts from every
    residual its projection on the taken one. It ends after N rows, or when the largest residual
    norm falls under 1e-10 of the round's first; the next round starts on the rows not yet taken,
    with their original weights. A round that takes none takes the rest by index. Norms within
    1e-12 of the round's first maximum of each other tie, and the lowest index wins. Computed in
    float64, on the weight's device.

    Returns:
        LongTensor ``[width]`` on the CPU.

    Raises:
        ValueError: ``weight`` is no matrix, holds NaN or infinity, or has fewer rows than ``width``.
    """
    return gram_schmidt(weight, width).indices


def gram_schmidt(weight: Tensor, width: int) -> Order:
    """As :func:`gram_schmidt_order`, with the residual norms."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix [M, N], not {list(weight.shape)}")
    if not 0 <= width <= len(weight):
        raise ValueError(f"width {width} must be between 0 and the {len(weight)} rows of weight")
    if not weight.isfinite().all():
        raise ValueError("weight holds NaN or infinity")
    rows = weight.detach().double()
    remaining = np.arange(len(rows))
    indices = [remaining[:0]]
    norms = [np.empty(0)]
    wanted = width
    while wanted > 0:
        taken, taken_norms = _Round(rows[_at(remaining, rows)]).run(wanted)
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

    def __init__(self, rows: Tensor) -> None:
        self.base = rows
        m, n = rows.shape
        self.directions = rows.new_empty(min(m, n), n)
        self.coefficients = rows.new_empty(m, min(m, n))
        self.rank = 0
        self.taken: list[int] = []
        self.norms: list[float] = []
        self.squares = self._computed_squares()
        self.first = self.scale = self._largest()

    def run(self, most: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Take up to ``most`` rows: their positions and residual norms."""
        most = min(most, *self.base.shape)
        while len(self.taken) < most:
            if self.rank and self._largest() < _REFRESH * self.scale:
                self._refresh()
            if self._largest() <= FLOOR * self.first:
                break
            self._take_block(most - len(self.taken))
        return np.array(self.taken, dtype=np.int64), np.array(self.norms)

    def _largest(self) -> float:
        return float(np.sqrt(self.squares.max(initial=0.0)))

    def _computed_squares(self) -> NDArray[np.float64]:
        squares: NDArray[np.float64] = self.base.square().sum(1).cpu().numpy()
        squares[self.taken] = -1.0
        return squares

    def _refresh(self) -> None:
        """Make the residuals the new base, and compute their norms anew."""
        directions = self.directions[: self.rank]
        self.base = self.base - self.coefficients[:, : self.rank] @ directions
        self.base -= (self.base @ directions.T) @ directions  # what rounding left of them
        self.rank = 0
        self.squares = self._computed_squares()
        self.scale = self._largest()

    def _take_block(self, most: int) -> None:
        pool, bound = self._pool()
        tie = TIE * self.first
        if self._largest() - tie <= bound:
            # More rows tie for the first place than the pool holds: take one, judged among all.
            all_norms = np.sqrt(np.maximum(self.squares, 0.0))
            pool = np.flatnonzero(all_norms >= all_norms.max() - tie)[:1]
            bound, most = -1.0, 1
        chosen, norms = self._picks(pool, bound, tie, most)
        self._project_out(pool[chosen])
        self.taken += pool[chosen].tolist()
        self.norms += norms
        self.squares[self.taken] = -1.0

    def _pool(self) -> tuple[NDArray[np.int64], float]:
        """The rows with the largest norms, by position, and an upper bound of the others' norms."""
        if len(self.squares) <= _POOL:
            return np.flatnonzero(self.squares >= 0), -1.0
        by_norm = np.argpartition(-self.squares, _POOL)
        pool, best_outside = by_norm[:_POOL], by_norm[_POOL]
        return np.sort(pool[self.squares[pool] >= 0]), float(
            np.sqrt(max(self.squares[best_outside], 0.0))
        )

    def _picks(
        self, pool: NDArray[np.int64], bound: float, tie: float, most: int
    ) -> tuple[list[int], list[float]]:
        """Pivoted Cholesky on the pool, as far as it surely holds the next row: at least one row.

        Returns positions within the pool in greedy order, and their residual norms.
        """
        gram = self._residual_gram(pool)
        squares = gram.diagonal().copy()
        columns = np.empty((min(most, len(pool)), len(pool)))
        chosen: list[int] = []
        norms: list[float] = []
        least = max(bound, _REFRESH * self.scale, FLOOR * self.first)
        while len(chosen) < len(columns):
            best = np.sqrt(squares.max(initial=0.0))
            if chosen and best - tie <= least:
                break
            # argmax of a boolean array is the lowest position that ties.
            pick = int((squares >= max(best - tie, 0.0) ** 2).argmax())
            pivot = np.sqrt(squares[pick])
            k = len(chosen)
            columns[k] = (gram[pick] - columns[:k, pick] @ columns[:k]) / pivot
            squares -= np.square(columns[k])
            chosen.append(pick)
            norms.append(float(pivot))
            squares[chosen] = -1.0
        return chosen, norms

    def _residual_gram(self, pool: NDArray[np.int64]) -> NDArray[np.float64]:
        at = _at(pool, self.base)
        rows, coefficients = self.base[at], self.coefficients[at, : self.rank]
        gram: NDArray[np.float64] = (
            (rows @ rows.T).addmm_(coefficients, coefficients.T, alpha=-1).cpu().numpy()
        )
        return gram

    def _project_out(self, positions: NDArray[np.int64]) -> None:
        """Add the directions of these rows, and subtract the projections on them from all norms."""
        at, k = _at(positions, self.base), self.rank
        before = self.directions[:k]
        residuals = self.base[at] - self.coefficients[at, :k] @ before
        new = torch.linalg.qr(residuals.T).Q.T
        new = F.normalize(new - (new @ before.T) @ before, dim=1)  # what rounding left of them
        self.rank = k + len(positions)
        self.directions[k : self.rank] = new
        self.coefficients[:, k : self.rank] = coefficients = self.base @ new.T
        self.squares -= coefficients.square().sum(1).cpu().numpy()
        np.maximum(self.squares, 0.0, out=self.squares)


def _at(positions: NDArray[np.int64], rows: Tensor) -> Tensor:
    """Positions as an index of ``rows``, on its device."""
    return torch.from_numpy(positions).to(rows.device)
