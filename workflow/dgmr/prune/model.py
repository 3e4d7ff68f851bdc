"""The pruned model: a timm model of a smaller ``mlp_ratio`` with the kept neurons' weights."""

from collections.abc import Mapping

from torch import Tensor

from dgmr.errors import DgmrError
from dgmr.models import TimmModel, largest_ratio, like, mlps
from dgmr.prune.compensate import Refit
from dgmr.prune.gram_schmidt import gram_schmidt_order


def prune_model(
    model: TimmModel,
    ratio: float,
    orders: Mapping[str, Tensor] | None = None,
    refits: Mapping[str, Refit] | None = None,
) -> TimmModel:
    """A new timm model that keeps ``int(ratio * N)`` hidden neurons of every MLP of ``model``.

    Args:
        model: made by ``timm.create_model``; it is left as it is.
        ratio: hidden neurons over embed dim, above 0, at most the model's own.
        orders: by MLP, indices ``[>= int(ratio * N)]`` in greedy order; computed where not given.
        refits: by MLP, the compensated fc2 for exactly those neurons; plain slices where not given.

    Raises:
        DgmrError: the ratio is impossible, or the family cannot be built with ``mlp_ratio``.
    """
    check_ratio(model, ratio)
    state = model.state_dict()
    for name, mlp in mlps(model).items():
        width = int(ratio * mlp.fc1.in_features)
        order = gram_schmidt_order(mlp.fc1.weight, width) if orders is None else orders[name]
        kept = order[:width]
        for key in ("fc1.weight", "fc1.bias"):
            if f"{name}.{key}" in state:
                state[f"{name}.{key}"] = state[f"{name}.{key}"][kept]
        state[f"{name}.fc2.weight"] = state[f"{name}.fc2.weight"][:, kept]
        if refits is not None:
            state[f"{name}.fc2.weight"] = refits[name].weight
            if refits[name].bias is not None:
                state[f"{name}.fc2.bias"] = refits[name].bias
    try:
        student = like(model, mlp_ratio=ratio).to(next(model.parameters()))
        student.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise DgmrError(
            f"timm does not build {type(model).__name__} with mlp_ratio {ratio} as a pruned one"
            f" must be: {error}"
        ) from None
    return student.train(model.training)


def check_ratio(model: TimmModel, ratio: float) -> None:
    """Refuse a ratio that leaves an MLP empty or asks for more neurons than it has.

    Raises:
        DgmrError: naming the ratio and the allowed range.
    """
    largest = largest_ratio(model)
    smallest = 1 / min(mlp.fc1.in_features for mlp in mlps(model).values())
    if not smallest <= ratio <= largest:
        raise DgmrError(
            f"prune.ratio is {ratio}, but the teacher's MLPs have at most {largest:g} hidden neurons"
            f" a dimension: choose a ratio from {smallest:.4f} to {largest:g}."
        )
