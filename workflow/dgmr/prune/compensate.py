"""Closed-form compensation: refit fc2 so that the kept neurons stand in for the dropped ones.

With hidden activations a (kept S, dropped P) and fc2 weight V, the dropped neurons added V_P a_P to
the MLP's output. Ridge regression on calibration tokens predicts that from a_S, and the prediction
is folded into fc2: V_S + B and b + c. The ridge pulls B to zero, that is, to plain slicing with the
dropped neurons' mean folded into the bias. Kin: CORP (arXiv 2602.05243).
"""

from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor

_TOKENS_AT_ONCE = 8192


class Refit(NamedTuple):
    """fc2 for the kept neurons, and what the refit gains on the calibration tokens."""

    weight: Tensor
    """``[N, k]``."""
    bias: Tensor | None
    """``[N]``; None where the dense fc2 has none."""
    error_plain: float
    """Mean squared output error of plain slicing, over the mean variance of the output."""
    error_refit: float
    """The same after the refit."""


class LeastSquares:
    """Normal equations of the refit, gathered chunk by chunk in float64.

    Memory is k^2 + kN whatever the number of tokens.
    """

    def __init__(self, mlp: Mlp, kept: Tensor) -> None:
        """``mlp``: the dense timm ``Mlp`` (N to M to N); ``kept``: ``[k]`` its neurons that stay."""
        self.mlp, self.kept = mlp, kept
        weight = mlp.fc2.weight.double()
        dropped = torch.ones(weight.shape[1], dtype=torch.bool)
        dropped[kept] = False
        self.dropped = dropped.nonzero().flatten()
        k, n = len(kept), len(weight)
        self.count = 0
        self.sum_kept = torch.zeros(k, dtype=torch.double)
        self.sum_lost = torch.zeros(n, dtype=torch.double)
        self.gram = torch.zeros(k, k, dtype=torch.double)
        self.cross = torch.zeros(k, n, dtype=torch.double)
        self.square_lost = 0.0
        self.sum_output = torch.zeros(n, dtype=torch.double)
        self.square_output = 0.0

    @torch.inference_mode()
    def add(self, inputs: Tensor) -> None:
        """Take in the MLP's ``inputs`` ``[tokens, N]``."""
        for chunk in inputs.split(_TOKENS_AT_ONCE):
            hidden = self.mlp.act(self.mlp.fc1(chunk))
            output = self.mlp.fc2(hidden).double()
            lost = (hidden[:, self.dropped] @ self.mlp.fc2.weight[:, self.dropped].T).double()
            kept = hidden[:, self.kept].double()
            self.count += len(chunk)
            self.sum_kept += kept.sum(0)
            self.sum_lost += lost.sum(0)
            self.gram += kept.T @ kept
            self.cross += kept.T @ lost
            self.square_lost += float(lost.square().sum())
            self.sum_output += output.sum(0)
            self.square_output += float(output.square().sum())

    def solve(self, ridge: float) -> Refit:
        """The refit fc2, with a ridge of ``ridge`` times the kept neurons' mean variance.

        Raises:
            ValueError: no tokens were added.
        """
        if self.count == 0:
            raise ValueError("least squares needs calibration tokens, there are none")
        weight, bias = self.mlp.fc2.weight, self.mlp.fc2.bias
        mean_kept, mean_lost = self.sum_kept / self.count, self.sum_lost / self.count
        if bias is None:  # nothing could hold a constant, so none is fitted
            mean_kept, mean_lost = torch.zeros_like(mean_kept), torch.zeros_like(mean_lost)
        covariance = self.gram / self.count - torch.outer(mean_kept, mean_kept)
        cross = self.cross / self.count - torch.outer(mean_kept, mean_lost)
        damping = max(ridge * float(covariance.diagonal().mean()), torch.finfo(torch.double).tiny)
        regularised = covariance + damping * torch.eye(len(covariance), dtype=torch.double)
        fold = torch.linalg.solve(regularised, cross)
        constant = mean_lost - mean_kept @ fold
        # E|lost - fold^T kept - constant|^2, from the moments alone.
        explained = 2 * (fold * cross).sum() - (fold * (covariance @ fold)).sum()
        lost_variance = self.square_lost / self.count - float(mean_lost.square().sum())
        mean_output = self.sum_output / self.count
        scale = self.square_output / self.count - float(mean_output.square().sum())
        scale = max(scale, torch.finfo(torch.double).tiny)
        return Refit(
            (weight[:, self.kept].double() + fold.T).to(weight.dtype),
            None if bias is None else (bias.double() + constant).to(bias.dtype),
            self.square_lost / self.count / scale,
            max(lost_variance - float(explained), 0.0) / scale,
        )
