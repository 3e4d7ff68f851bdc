"""The pruned student from the blocks' orders and refits."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgmr import artefact, weights
from dgmr.files import read_json
from dgmr.mlps import mlps
from dgmr.mlps import widths as widths_of
from dgmr.params import Prune
from dgmr.prune import orders as block_orders
from dgmr.prune.model import Refit, build, pruned_tensors
from dgmr.prune.refits import Refits
from dgmr.prune.widths import kept as kept_units

METRICS = "blocks.json"


def assemble(
    teacher: Path, orders: Path, refit_parts: list[Path], config: Prune, output: Path
) -> None:
    """Write the model artefact ``output`` and, in it, ``blocks.json``: what was kept per block.

    ``refit_parts`` are the part files of the refits; none: fc2 is only sliced.
    """
    parent = artefact.provenance(teacher)
    dense = artefact.skeleton(teacher)
    order_of = block_orders.load(orders, parent["sha256"])
    kept = kept_units(dense, config, order_of)
    about = {name: values for path in refit_parts for name, values in read_json(path).items()}
    refits = Refits(refit_parts[0].parent, list(about)) if refit_parts else {}
    how = ("sequential" if config.sequential else "least_squares") if refits else "none"
    widths = widths_of(dense) | {name: len(indices) for name, indices in kept.items()}
    blocks = {
        name: {
            "hidden_features": width,
            "kept": widths[name],
            "gains": order_of[name].gains.tolist(),
            **about.get(name, {}),
        }
        for name, width in widths_of(dense).items()
    }
    provenance = {"stage": "prune", "method": config.method, "compensate": how}
    write(teacher, kept, refits, output, provenance, {METRICS: blocks})


def write(
    source: Path,
    kept: Mapping[str, Tensor],
    refits: Mapping[str, Refit],
    output: Path,
    provenance: dict[str, Any],
    beside: dict[str, Any],
) -> None:
    """Write the model artefact ``output``: ``source`` with the hidden units ``kept``, by MLP.

    ``provenance`` gains the source's hash and all widths. One tensor is in memory at a time.
    """
    dense = artefact.skeleton(source)
    found = mlps(dense)
    widths = widths_of(dense) | {name: len(indices) for name, indices in kept.items()}
    with torch.device("meta"):
        student = build(dense, widths)

    def pruned(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return pruned_tensors(tensors, found, kept, refits)

    file = source / artefact.WEIGHTS
    layout = weights.layout(file)
    parent = {"parent_sha256": artefact.provenance(source)["sha256"], "widths": widths}
    content = dict(pruned(layout.items())), pruned(weights.tensors(file, layout))
    artefact.save(output, student, provenance | parent, beside, content)
