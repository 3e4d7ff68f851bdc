"""The pruned student from the blocks' orders and refits."""

from pathlib import Path

from dgmr import artefact
from dgmr.files import read_json
from dgmr.models import widths
from dgmr.prune import orders as block_orders
from dgmr.prune import refits as block_refits
from dgmr.prune.model import prune_model

METRICS = "blocks.json"


def assemble(
    teacher: Path, orders: Path, refit_parts: list[Path], ratio: float, output: Path
) -> None:
    """Write the model artefact ``output`` and, in it, ``blocks.json``: what was kept per block.

    ``refit_parts`` are the part files of the refits; none: fc2 is only sliced.
    """
    parent = artefact.provenance(teacher)
    dense = artefact.load(teacher)
    order_of = block_orders.load(orders, parent["sha256"])
    errors = {name: e for path in refit_parts for name, e in read_json(path).items()}
    refits = block_refits.load(refit_parts[0].parent, errors) if refit_parts else None
    student = prune_model(
        dense, ratio, {name: order.indices for name, order in order_of.items()}, refits
    )
    kept = widths(student)
    blocks = {
        name: {
            "hidden_features": width,
            "kept": kept[name],
            "residual_norms": order_of[name].residual_norms.tolist(),
            **errors.get(name, {}),
        }
        for name, width in widths(dense).items()
    }
    artefact.save(
        output,
        student,
        {
            "stage": "prune",
            "parent_sha256": parent["sha256"],
            "ratio": ratio,
            "compensate": "least_squares" if refits else "none",
            "widths": kept,
        },
        {METRICS: blocks},
    )
