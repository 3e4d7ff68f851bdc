"""Loss terms: how far the student's answers are from the teacher's. Computed in float32."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dgmr.answers import BLOCK, PATCH_TOKENS, POOLED
from dgmr.params import LossWeights

Answered = Mapping[str, Tensor]
"""A model's answers by name, as :mod:`dgmr.answers` has them."""
Term = Callable[[Answered, Answered], Tensor]


def pooled(student: Answered, teacher: Answered) -> Tensor:
    """Mean squared error of the class-token or pooled output."""
    return _mse(POOLED, student, teacher)


def patch_tokens(student: Answered, teacher: Answered) -> Tensor:
    """Mean squared error of the last block's patch tokens."""
    return _mse(PATCH_TOKENS, student, teacher)


def blocks(student: Answered, teacher: Answered) -> Tensor:
    """Mean over blocks of the mean squared error of their output tokens."""
    names = [name for name in teacher if name.startswith(BLOCK)]
    return torch.stack([_mse(name, student, teacher) for name in names]).mean()


def _mse(name: str, student: Answered, teacher: Answered) -> Tensor:
    return F.mse_loss(student[name].float(), teacher[name].float())


TERMS: dict[str, Term] = {"pooled": pooled, "patch_tokens": patch_tokens, "blocks": blocks}


def weighted(
    weights: LossWeights, student: Answered, teacher: Answered
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (DGMR's, with weights 1 and 1), and its terms by name, unweighted.

    A term of weight 0 is none: it is not computed.
    """
    chosen = {name: getattr(weights, name) for name in TERMS if getattr(weights, name)}
    terms = {name: TERMS[name](student, teacher) for name in chosen}
    loss = torch.stack([chosen[name] * term for name, term in terms.items()]).sum()
    return loss, {name: term.detach() for name, term in terms.items()}
