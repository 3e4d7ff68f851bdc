"""List the features under ``work/`` in ``results/features/manifest.json``, with their hashes."""

import json
from pathlib import Path

from safetensors import safe_open

from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import ORIGIN, sha256, write_json
from dgmr.params import Features
from dgmr.shards import MANIFEST


def publish(
    teacher: Path, target_folders: list[Path], calibration: Path, config: Features, output: Path
) -> None:
    """Write the manifest to ``output``; the files stay where they are.

    Raises:
        DgmrError: a file was made by another teacher.
    """
    teacher_sha256 = artefact.provenance(teacher)["sha256"]
    files = [path for folder in target_folders for path in _files(folder)]
    listed_targets = _listed(files, teacher_sha256)
    listed_calibration = _listed(_files(calibration), teacher_sha256)
    write_json(
        output / MANIFEST,
        {
            "teacher_sha256": teacher_sha256,
            "views": config.views.model_dump(mode="json"),
            "dtype": config.dtype,
            "targets": listed_targets,
            "calibration": listed_calibration,
        },
    )
    write_json(
        output / "metrics.json",
        {
            "target_files": len(listed_targets),
            "target_bytes": sum(path.stat().st_size for path in files),
            "calibration_files": len(listed_calibration),
            "calibration_bytes": sum(p.stat().st_size for p in _files(calibration)),
        },
    )


def _files(folder: Path) -> list[Path]:
    """Without Snakemake's own, by which it dates a folder."""
    return sorted(folder.glob("*.safetensors"))


def _listed(paths: list[Path], teacher_sha256: str) -> dict[str, dict[str, str]]:
    """By file name: path, hash and what the file says it was made from."""
    listed = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            origin: dict[str, str] = json.loads(file.metadata()[ORIGIN])
        if origin["teacher_sha256"] != teacher_sha256:
            raise DgmrError(
                f"{path} was made by another teacher than results/teacher holds: delete its folder"
                " and run snakemake again."
            )
        listed[path.name] = {"path": str(path), "sha256": sha256(path), **origin}
    return listed
