"""Gather what the models scored into one folder: ``<model>.json`` and ``speed.json``."""

import shutil
from pathlib import Path

from dgmr.files import replaced_folder

SPEED = "speed.json"


def gather(scores: dict[str, Path], speed: Path, output: Path) -> None:
    """Copy ``scores`` (by model) and ``speed`` to the folder ``output``, which holds nothing else then."""
    with replaced_folder(output) as partial:
        for name, path in scores.items():
            shutil.copyfile(path, partial / f"{name}.json")
        shutil.copyfile(speed, partial / SPEED)
