"""Pruning on: a model that was pruned and distilled before loses more hidden units."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dgmr import artefact
from dgmr.files import scratch_beside
from dgmr.mlps import mlps
from dgmr.params import Features, Prune, StagePrune
from dgmr.prune import orders as block_orders
from dgmr.prune.assemble import METRICS, write
from dgmr.prune.model import Refit
from dgmr.prune.refits import Plan, Refits, sequential
from dgmr.prune.widths import shrunk


def prune_again(
    parent: Path,
    teacher: Path,
    orders: Path,
    data: Path,
    features: Features,
    config: Prune,
    stage: StagePrune,
    output: Path,
) -> None:
    """Write the model artefact ``output``: ``parent`` pruned further, as ``stage`` says.

    The teacher's orders are sliced again: where the parent has all the teacher's hidden units, it
    keeps the first of its order; where it was pruned, its units are such a slice already, and it keeps
    the first of them. If ``config`` compensates, fc2 is refitted block after block, on the inputs the
    pruned model itself gives, towards what the parent's MLPs say.

    Raises:
        DgmrError: a width is impossible.
    """
    skeleton = artefact.skeleton(parent)
    found, dense = mlps(skeleton), mlps(artefact.skeleton(teacher))
    order_of = block_orders.load(orders, artefact.provenance(teacher)["sha256"])
    widths = shrunk(skeleton, stage, config)
    kept = {}
    for name, width in widths.items():
        if width < found[name].hidden_features:
            is_dense = found[name].hidden_features == dense[name].hidden_features
            kept[name] = order_of[name].indices[:width] if is_dense else torch.arange(width)
    provenance = {"stage": "prune again", "compensate": config.compensate}
    with scratch_beside(output) as scratch:
        about: dict[str, Any] = {}
        refits: Mapping[str, Refit] = {}
        if config.compensate == "least_squares":
            plan = Plan(artefact.provenance(parent)["sha256"], found, kept, config)
            about = sequential(plan, parent, data, features, scratch)
            refits = Refits(scratch, list(kept))
        blocks = {
            name: {"hidden_features": mlp.hidden_features, "kept": widths[name]}
            | about.get(name, {})
            for name, mlp in found.items()
        }
        write(parent, kept, refits, output, provenance, {METRICS: blocks})
