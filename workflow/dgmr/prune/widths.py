"""How many hidden units every MLP keeps."""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dgmr.errors import DgmrError, told_of
from dgmr.mlps import PrunableMlp, in_range, mlps
from dgmr.models import TimmModel, count_parameters
from dgmr.params import Prune, Stage, StagePrune
from dgmr.prune.methods import Order
from dgmr.prune.model import build, check_widths


def reach(mlp: PrunableMlp, max_ratio: float) -> int:
    """Hidden units that an order has to reach."""
    return min(mlp.hidden_features, int(max_ratio * mlp.in_features))


def resolve(
    found: Mapping[str, PrunableMlp],
    config: Prune,
    params: int,
    gains: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Hidden units to keep by MLP name, as ``config`` wants them.

    Args:
        found: the dense model's MLPs; their structure is enough.
        config: the section ``prune``.
        params: the dense model's parameters, for a budget.
        gains: by MLP, what each unit in its order gains, ``[reach]``, for a budget; without them
            all MLPs are taken to gain alike, which is enough to know what the student will cost.

    Raises:
        DgmrError: a width is impossible, or not one MLP has a name that is given.
    """
    prunable = {n: m for n, m in found.items() if config.include_pool_head or not m.in_pool_head}
    if config.hidden_features is not None:
        _check_names(config.hidden_features, prunable)
        widths = {n: config.hidden_features.get(n, m.hidden_features) for n, m in prunable.items()}
    elif config.budget is not None:
        widths = _spend(prunable, config, params, gains)
    elif config.keep is not None:
        widths = {name: int(config.keep * mlp.hidden_features) for name, mlp in prunable.items()}
    else:
        assert config.ratio is not None
        widths = {name: int(config.ratio * mlp.in_features) for name, mlp in prunable.items()}
    for name, mlp in found.items():
        widths.setdefault(name, mlp.hidden_features)
        if widths[name] < mlp.hidden_features:
            widths[name] = _rounded(widths[name], config.round_to, mlp.hidden_features)
        _check_reach(name, mlp, widths[name], config.max_ratio)
    check_widths(found, widths)
    return {name: widths[name] for name in found}


def shrunk(model: TimmModel, stage: StagePrune, config: Prune) -> dict[str, int]:
    """Hidden units of every MLP of ``model`` once it is pruned further, as a stage wants it.

    Raises:
        DgmrError: there are not so many blocks, or an MLP has fewer hidden units already.
    """
    found = mlps(model)
    names = [n for n, mlp in found.items() if not mlp.in_pool_head]
    if stage.blocks is not None:
        names = list(in_range(names, stage.blocks))
    elif config.include_pool_head:
        names = list(found)
    widths = {name: mlp.hidden_features for name, mlp in found.items()}
    for name in names:
        mlp = found[name]
        wanted = int(stage.ratio * mlp.in_features)
        if wanted > mlp.hidden_features:
            raise DgmrError(
                f"{name} would keep {wanted} hidden units, but it has only {mlp.hidden_features} left"
                " by then: lower the ratio."
            )
        widths[name] = _rounded(wanted, config.round_to, mlp.hidden_features)
        _check_reach(name, mlp, widths[name], config.max_ratio)
    check_widths(found, widths)
    return widths


def students(
    teacher: TimmModel, config: Prune, stages: Mapping[str, Stage]
) -> dict[str, TimmModel]:
    """The pruned model and what each stage leaves, by name, on the meta device.

    With a budget, as if all hidden units gained alike.

    Raises:
        DgmrError: a width is impossible.
    """
    with torch.device("meta"):
        student = build(teacher, resolve(mlps(teacher), config, count_parameters(teacher)))
        found = {"pruned": student}
        for name, stage in stages.items():
            if stage.prune is not None:
                with told_of(f"distill.stages.{name}.prune"):
                    student = build(student, shrunk(student, stage.prune, config))
            found[name] = student
    return found


def kept(skeleton: TimmModel, config: Prune, orders: Mapping[str, Order]) -> dict[str, Tensor]:
    """Indices of the hidden units to keep, by MLP, of those that lose any."""
    found = mlps(skeleton)
    params = count_parameters(skeleton)
    gains = {name: order.gains for name, order in orders.items()}
    return {
        name: orders[name].indices[:width]
        for name, width in resolve(found, config, params, gains).items()
        if width < found[name].hidden_features
    }


def _check_reach(name: str, mlp: PrunableMlp, width: int, max_ratio: float) -> None:
    if reach(mlp, max_ratio) < width < mlp.hidden_features:
        raise DgmrError(
            f"prune: {name} would keep {width} hidden units, but prune.max_ratio {max_ratio:g} orders"
            f" only {reach(mlp, max_ratio)}: raise it to at least"
            f" {_ratio_for(width, mlp.in_features):g}."
        )


def _ratio_for(width: int, in_features: int) -> float:
    """The smallest ratio of four decimals that gives ``width``."""
    ratio = math.ceil(1e4 * width / in_features)
    return (ratio if int(ratio / 1e4 * in_features) >= width else ratio + 1) / 1e4


def _rounded(width: int, multiple: int, most: int) -> int:
    return min(-(-width // multiple) * multiple, most)


def _check_names(given: Mapping[str, int], prunable: Mapping[str, PrunableMlp]) -> None:
    for name in given:
        if name not in prunable:
            raise DgmrError(
                f"prune.hidden_features: the teacher has no MLP {name} to be pruned; it has"
                f" {', '.join(prunable)}."
            )


def _spend(
    prunable: Mapping[str, PrunableMlp],
    config: Prune,
    params: int,
    gains: Mapping[str, Tensor] | None,
) -> dict[str, int]:
    """Merge the MLPs' curves of gain a parameter, and go down the merged one until all is spent.

    A curve never rises: a unit that gains more than the one before it (a new round of Gram-Schmidt)
    counts for no more than that one.
    """
    assert config.budget is not None
    costs = {name: mlp.unit_parameters for name, mlp in prunable.items()}
    fixed = params - sum(mlp.hidden_features * costs[name] for name, mlp in prunable.items())
    left = int(config.budget * params) - fixed
    steps: list[tuple[float, int, str, int]] = []
    widths = {}
    for name, mlp in prunable.items():
        # On the CPU even where the model is built on the meta device.
        curve = torch.ones(mlp.hidden_features, device="cpu") if gains is None else gains[name]
        falling = curve.double().cummin(0).values / costs[name]
        most = reach(mlp, config.max_ratio)
        ends = [*range(config.round_to, most, config.round_to)]
        if most == mlp.hidden_features or most % config.round_to == 0:
            ends.append(most)
        widths[name] = ends[0] if ends else most
        left -= widths[name] * costs[name]
        means = (float(falling[start:end].mean()) for start, end in itertools.pairwise(ends))
        steps += [
            (-mean, start, name, end)
            # Never rising, whatever rounding made of the means.
            for mean, (start, end) in zip(
                itertools.accumulate(means, min), itertools.pairwise(ends), strict=True
            )
        ]
    if left < 0:
        raise DgmrError(
            f"prune.budget {config.budget:g} is too small: with one hidden unit (or round_to) in each"
            f" MLP the student still has {config.budget - left / params:.4f} of the teacher's parameters."
        )
    most_spent = sum((end - start) * costs[name] for _, start, name, end in steps)
    if left - most_spent > 0.01 * params and any(
        reach(mlp, config.max_ratio) < mlp.hidden_features for mlp in prunable.values()
    ):
        raise DgmrError(
            f"prune.budget {config.budget:g} is more than prune.max_ratio {config.max_ratio:g} lets the"
            f" student have ({config.budget - (left - most_spent) / params:.4f} of the teacher's"
            " parameters): raise max_ratio, or lower the budget."
        )
    full: set[str] = set()
    for _, start, name, end in sorted(steps):
        cost = (end - start) * costs[name]
        if name in full or cost > left:
            full.add(name)
            continue
        widths[name] = end
        left -= cost
    return widths
