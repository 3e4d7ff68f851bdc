"""List the features under ``work/`` in ``results/features/manifest.json``, with their hashes."""

from pathlib import Path
from typing import Any

from dgmr import artefact, targets, weights
from dgmr.errors import DgmrError
from dgmr.files import replaced_files, sha256, write_json
from dgmr.params import Features
from dgmr.shards import MANIFEST
from dgmr.views import ViewTransform


def publish(
    teacher: Path, target_folders: list[Path], calibration: Path, config: Features, output: Path
) -> None:
    """Write the manifest to ``output``; the files stay where they are.

    Raises:
        DgmrError: a file was made by another teacher, or of other views.
    """
    teacher_sha256 = artefact.provenance(teacher)["sha256"]
    transform = ViewTransform.for_model(artefact.skeleton(teacher), config.views)
    about = targets.about(teacher_sha256, transform.about(), config)
    files = [path for folder in target_folders for path in _files(folder)]
    listed_targets = _listed(files, about)
    listed_calibration = _listed(_files(calibration), {"teacher_sha256": teacher_sha256})
    manifest = {
        "about": about,
        "config": config.model_dump(mode="json"),
        "targets": listed_targets,
        "calibration": listed_calibration,
    }
    sizes = {
        "target_files": len(listed_targets),
        "target_bytes": sum(path.stat().st_size for path in files),
        "calibration_files": len(listed_calibration),
        "calibration_bytes": sum(p.stat().st_size for p in _files(calibration)),
    }
    with replaced_files(output, MANIFEST) as folder:
        write_json(folder / "metrics.json", sizes)
        write_json(folder / MANIFEST, manifest)


def _files(folder: Path) -> list[Path]:
    """Without Snakemake's own, by which it dates a folder."""
    return sorted(folder.glob("*.safetensors"))


def _listed(paths: list[Path], about: dict[str, Any]) -> dict[str, dict[str, str]]:
    """By file name: path, hash and what the file says of itself beyond ``about``, in which all agree."""
    listed = {}
    for path in paths:
        origin = weights.origin(path) or {}
        if any(origin.get(name) != value for name, value in about.items()):
            raise DgmrError(
                f"{path} is damaged, or was made by another teacher or of other views than"
                " results/teacher and params.yaml say: delete its folder and run snakemake again."
            )
        own = {name: value for name, value in origin.items() if name not in about}
        listed[path.name] = {"path": str(path), "sha256": sha256(path), **own}
    return listed
