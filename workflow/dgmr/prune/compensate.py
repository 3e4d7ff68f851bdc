"""Closed-form compensation: refit fc2 so that the kept hidden units stand in for the dropped ones.

What the pruned MLP lacks of the dense one's output is predicted from the kept activations by ridge
regression on calibration tokens, and the prediction folded into fc2 and its bias. The ridge pulls the
fold to zero, that is, to plain slicing with the lost mean added to the bias. Kin: CORP (arXiv
2602.05243). Works for gated MLPs and inner norms alike, for it looks at what enters fc2.

t: tokens, k: kept hidden units, N: outputs of the MLP.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgmr.prune.model import Refit

RIDGES = tuple(10.0**exponent for exponent in range(-9, 1))
"""Tried where no ridge is given, as multiples of the kept units' mean variance."""
_TINY = torch.finfo(torch.double).tiny
# Of the kept units' mean square: variance below it is rounding, as of units that never change.
_ROUNDING = 1e-12


class Fold(NamedTuple):
    """A solution of the regression, and what it gains on images that had no part in it."""

    weight: Tensor
    """``[k, N]``, to be added to fc2's transposed weight."""
    bias: Tensor
    """``[N]``, to be added to fc2's bias; zeros where it has none."""
    ridge: float
    error_plain: float
    """Mean squared output error of plain slicing on the held-out tokens, over the output's variance."""
    error_refit: float
    """The same after the refit."""

    def applied(self, weight: Tensor, bias: Tensor | None) -> Refit:
        """fc2's sliced ``weight`` ``[N, k]`` and ``bias`` ``[N]`` with the fold added."""
        return Refit(
            (weight.double() + self.weight.T).to(weight.dtype),
            None if bias is None else (bias.double() + self.bias).to(bias.dtype),
        )


class _Moments:
    """Sums over tokens in float64: k^2 + kN numbers, however many tokens there are."""

    def __init__(self, k: int, n: int) -> None:
        self.count = 0
        self.kept = torch.zeros(k, dtype=torch.double)
        self.lost = torch.zeros(n, dtype=torch.double)
        self.gram = torch.zeros(k, k, dtype=torch.double)
        self.cross = torch.zeros(k, n, dtype=torch.double)
        self.square_lost = 0.0
        self.output = torch.zeros(n, dtype=torch.double)
        self.square_output = 0.0

    def add(self, hidden: Tensor, lost: Tensor, output: Tensor) -> None:
        hidden, lost, output = (t.to("cpu", torch.double) for t in (hidden, lost, output))
        self.count += len(hidden)
        self.kept += hidden.sum(0)
        self.lost += lost.sum(0)
        self.gram.addmm_(hidden.T, hidden)
        self.cross.addmm_(hidden.T, lost)
        self.square_lost += float(lost.square().sum())
        self.output += output.sum(0)
        self.square_output += float(output.square().sum())

    def __iadd__(self, other: "_Moments") -> "_Moments":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def solve(self, ridge: float, constant: bool) -> tuple[Tensor, Tensor]:
        """``[k, N]`` and ``[N]``; without a ``constant`` the latter is zero."""
        kept, lost = self.kept / self.count, self.lost / self.count
        if not constant:
            kept, lost = torch.zeros_like(kept), torch.zeros_like(lost)
        covariance = (self.gram / self.count).addr_(kept, kept, alpha=-1)
        cross = (self.cross / self.count).addr_(kept, lost, alpha=-1)
        square = float(self.gram.diagonal().mean()) / self.count
        damping = ridge * float(covariance.diagonal().mean())
        damping = max(damping, _ROUNDING * square, _TINY)
        covariance.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:  # rounding made it indefinite: as good as no regression with so small a ridge
            return torch.zeros_like(cross), lost
        weight = torch.cholesky_solve(cross, factor)
        return weight, lost - kept @ weight

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """E|lost - weight^T hidden - bias|^2 over the output's variance."""
        kept, lost = self.kept / self.count, self.lost / self.count
        explained = 2 * (weight * self.cross).sum() - (weight * (self.gram @ weight)).sum()
        square = (self.square_lost - float(explained)) / self.count
        square += float(bias @ (bias - 2 * lost + 2 * (kept @ weight)))
        mean = self.output / self.count
        variance = self.square_output / self.count - float(mean.square().sum())
        return max(square, 0.0) / max(variance, _TINY)


class LeastSquares:
    """The regression, gathered piece by piece."""

    def __init__(self, k: int, n: int, bias: bool = True) -> None:
        """``bias``: whether fc2 has one; if not, nothing can hold a constant and none is fitted."""
        self._fit, self._held_out = _Moments(k, n), _Moments(k, n)
        self._bias = bias

    def add(self, hidden: Tensor, lost: Tensor, output: Tensor, held_out: bool) -> None:
        """Take in some tokens.

        Args:
            hidden: ``[t, k]``, what enters the pruned MLP's fc2.
            lost: ``[t, N]``, the dense MLP's output less the pruned one's.
            output: ``[t, N]``, the dense MLP's output.
            held_out: whether they are for choosing the ridge and telling the error.
        """
        (self._held_out if held_out else self._fit).add(hidden, lost, output)

    def solve(self, ridge: float | None = None) -> Fold:
        """The fold of all tokens, with the given ``ridge`` or the one of least held-out error.

        The errors are those of a fold that has not seen the held-out tokens.

        Raises:
            ValueError: no tokens were added, none were held out, or they hold NaN or infinity.
        """
        if 0 in (self._fit.count, self._held_out.count):
            raise ValueError(
                f"least squares needs calibration tokens to fit ({self._fit.count} given) and"
                f" to hold out ({self._held_out.count} given)"
            )
        best, error = 0.0, math.inf
        for tried in RIDGES if ridge is None else (ridge,):
            tried_error = self._held_out.error(*self._fit.solve(tried, self._bias))
            if tried_error < error:
                best, error = tried, tried_error
        if not math.isfinite(error):
            raise ValueError("the calibration activations hold NaN or infinity")
        zero = torch.zeros_like(self._fit.cross), torch.zeros_like(self._fit.lost)
        plain = self._held_out.error(*zero)
        together = copy.copy(self._fit)
        together += self._held_out
        return Fold(*together.solve(best, self._bias), best, plain, error)
