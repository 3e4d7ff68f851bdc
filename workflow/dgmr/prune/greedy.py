"""Greedy selection on calibration activations: Gram-Schmidt, and orthogonal least squares.

Both walk the hidden units' activations A ``[tokens, M]`` as Gram-Schmidt walks the rows of a weight,
and both need only moments: G = A^T A ``[M, M]``. Each pick is orthogonalised against those before it,
which in terms of G is a column of a pivoted Cholesky factor L.

- Gram-Schmidt takes the unit with the largest residual variance d_j.
- Orthogonal least squares takes the unit that explains most of the MLP's output Y = A V^T:
  with C = A^T Y = G V^T and C_j the residual of its row j, the unit with the largest |C_j|^2 / d_j
  (Chen, Billings and Luo 1989, for many outputs). A unit that varies much but that fc2 hardly reads,
  or reads in a direction already explained, is left.

Picks are made in blocks: a pool of the units with the best scores is worked on alone, by their small
Gram and cross matrices, and a few matrix products then bring all units up to date. The Gram-Schmidt
score never grows, so there the picks are exactly the greedy ones. That of least squares may: a unit
outside the pool that overtakes within a block is seen only after it.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of a unit's own variance. Less is left where rounding (of float32 activations) is as large.
FLOOR = 1e-6
_TINY = np.finfo(np.float64).tiny
POOL = 384
BLOCK = 64


class Selection(NamedTuple):
    """Hidden units in greedy order."""

    indices: Tensor
    """``[width]`` int64."""
    gains: Tensor
    """``[width]`` float64: residual variance, or output variance explained, each times the tokens."""


def select(gram: Tensor, cross: Tensor | None, width: int) -> Selection:
    """The first ``width`` hidden units in greedy order.

    A round ends when every unit left has under 1e-6 of its variance; the next starts anew on those.
    A round that takes none takes the rest by index.

    Args:
        gram: ``[M, M]`` float64, symmetric.
        cross: ``[M, N]`` float64 for orthogonal least squares; None for Gram-Schmidt.
        width: at most M.
    """
    remaining = torch.arange(len(gram))
    indices, gains = [remaining[:0]], [torch.zeros(0, dtype=torch.double)]
    while (wanted := width - sum(map(len, indices))) > 0:
        one = _Round(gram, cross, remaining, wanted)
        taken, gained = one.run()
        if not taken:
            taken, gained = remaining[:wanted].tolist(), [0.0] * wanted
        indices.append(torch.tensor(taken))
        gains.append(torch.tensor(gained, dtype=torch.double))
        remaining = remaining[~torch.isin(remaining, indices[-1])]
    return Selection(torch.cat(indices), torch.cat(gains))


class _Round:
    """One round on the units ``allowed``. Rows of taken and other units are kept up to date too."""

    def __init__(self, gram: Tensor, cross: Tensor | None, allowed: Tensor, most: int) -> None:
        self.gram = gram
        self.cross = None if cross is None else cross.clone()
        self.variances = gram.diagonal().clone()
        self.floors = torch.full_like(self.variances, torch.inf)
        self.floors[allowed] = (FLOOR * self.variances[allowed]).clamp(
            min=FLOOR**2 * float(self.variances.max())
        )
        self.factor = gram.new_empty(len(gram), most)
        self.taken: list[int] = []
        self.gains: list[float] = []

    def run(self) -> tuple[list[int], list[float]]:
        """Units taken and what each gained, at most as many as are wanted."""
        while len(self.taken) < self.factor.shape[1]:
            scores = self._scores()
            pool = torch.sort(scores.topk(min(POOL, len(scores))).indices).values
            pool = pool[scores[pool] >= 0]
            if len(pool) == 0:
                break
            scores[pool] = -1
            self._take_block(pool, bound=float(scores.max()))
        return self.taken, self.gains

    def _scores(self) -> Tensor:
        """What each unit would gain; -1 where it cannot be taken."""
        scores = self.variances
        if self.cross is not None:
            scores = self.cross.square().sum(1) / self.variances
        return torch.where(self.variances > self.floors, scores, -1.0)

    def _take_block(self, pool: Tensor, bound: float) -> None:
        most = min(BLOCK, self.factor.shape[1] - len(self.taken))
        picks, columns = self._picks(pool, bound, most)
        k, chosen = len(self.taken), pool[picks]
        lower = torch.from_numpy(columns[picks]).to(self.gram)
        new = self.gram[chosen] - self.factor[chosen, :k] @ self.factor[:, :k].T
        new = torch.linalg.solve_triangular(lower, new, upper=False)
        if self.cross is not None:
            explained = torch.linalg.solve_triangular(lower, self.cross[chosen], upper=False)
            self.cross.addmm_(new.T, explained, alpha=-1)
        self.variances -= new.square().sum(0)
        self.floors[chosen] = torch.inf
        self.factor[:, k : k + len(picks)] = new.T
        self.taken += chosen.tolist()

    def _picks(
        self, pool: Tensor, bound: float, most: int
    ) -> tuple[list[int], NDArray[np.float64]]:
        """Positions within the pool in greedy order, and the pool's rows of their Cholesky columns.

        At least one; then for as long as the best of the pool gains more than ``bound``.
        """
        k = len(self.taken)
        earlier = self.factor[pool, :k]
        gram = (self.gram[pool][:, pool] - earlier @ earlier.T).cpu().numpy()
        both = None if self.cross is None else (self.cross[pool] @ self.cross[pool].T).cpu().numpy()
        variances = self.variances[pool].cpu().numpy().copy()
        floors = self.floors[pool].cpu().numpy().copy()
        columns = np.zeros((len(pool), most))
        picks: list[int] = []
        while len(picks) < most:
            gains = variances if both is None else both.diagonal() / np.maximum(variances, _TINY)
            gains = np.where(variances > floors, gains, -1.0)
            pick = int(gains.argmax())
            if gains[pick] < 0 or (picks and gains[pick] < bound):
                break
            pivot = np.sqrt(variances[pick])
            column = (gram[pick] - columns @ columns[pick]) / pivot
            if both is not None:
                # C loses column * direction, so C C^T loses this.
                along = both[pick] / pivot
                both -= np.outer(column, along - gains[pick] / 2 * column)
                both -= np.outer(along - gains[pick] / 2 * column, column)
            columns[:, len(picks)] = column
            variances -= column**2
            floors[pick] = np.inf
            picks.append(pick)
            self.gains.append(float(gains[pick]))
        return picks, columns[:, : len(picks)]
