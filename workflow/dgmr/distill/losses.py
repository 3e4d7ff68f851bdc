"""Loss terms: how far the student's outputs are from the teacher's. Computed in float32."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from dgmr.models import Outputs
from dgmr.params import LossWeights

Term = Callable[[Outputs, Outputs], Tensor]


def pooled(student: Outputs, teacher: Outputs) -> Tensor:
    """Mean squared error of the class-token or pooled output."""
    return F.mse_loss(student.pooled.float(), teacher.pooled.float())


def patch_tokens(student: Outputs, teacher: Outputs) -> Tensor:
    """Mean squared error of the last block's patch tokens."""
    return F.mse_loss(student.patch_tokens.float(), teacher.patch_tokens.float())


TERMS: dict[str, Term] = {"pooled": pooled, "patch_tokens": patch_tokens}


def weighted(
    weights: LossWeights, student: Outputs, teacher: Outputs
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (DGMR's, with weights 1 and 1), and every term by name, unweighted."""
    terms = {name: term(student, teacher) for name, term in TERMS.items()}
    loss = sum((getattr(weights, name) * value for name, value in terms.items()), start=0.0)
    assert isinstance(loss, Tensor)
    return loss, {name: value.detach() for name, value in terms.items()}
