"""The pruned student from the blocks' orders and refits."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dgmr import artefact, weights
from dgmr.files import read_json
from dgmr.mlps import mlps
from dgmr.mlps import widths as widths_of
from dgmr.params import Prune
from dgmr.prune import orders as block_orders
from dgmr.prune.model import build, pruned_tensors
from dgmr.prune.refits import Refits
from dgmr.prune.widths import kept as kept_units

METRICS = "blocks.json"


def assemble(
    teacher: Path, orders: Path, refit_parts: list[Path], config: Prune, output: Path
) -> None:
    """Write the model artefact ``output`` and, in it, ``blocks.json``: what was kept per block.

    ``refit_parts`` are the part files of the refits; none: fc2 is only sliced. One tensor is in
    memory at a time.
    """
    parent = artefact.provenance(teacher)
    dense = artefact.skeleton(teacher)
    found = mlps(dense)
    order_of = block_orders.load(orders, parent["sha256"])
    kept = kept_units(dense, config, order_of)
    about = {name: values for path in refit_parts for name, values in read_json(path).items()}
    refits = Refits(refit_parts[0].parent, list(about)) if refit_parts else {}
    widths = widths_of(dense) | {name: len(indices) for name, indices in kept.items()}
    with torch.device("meta"):
        student = build(dense, widths)

    def pruned(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        return pruned_tensors(tensors, found, kept, refits)

    how = ("sequential" if config.sequential else "least_squares") if refits else "none"
    file = teacher / artefact.WEIGHTS
    layout = weights.layout(file)
    blocks = {
        name: {
            "hidden_features": width,
            "kept": widths[name],
            "gains": order_of[name].gains.tolist(),
            **about.get(name, {}),
        }
        for name, width in widths_of(dense).items()
    }
    artefact.save(
        output,
        student,
        {
            "stage": "prune",
            "parent_sha256": parent["sha256"],
            "method": config.method,
            "compensate": how,
            "widths": widths,
        },
        {METRICS: blocks},
        (dict(pruned(layout.items())), pruned(weights.tensors(file, layout))),
    )
