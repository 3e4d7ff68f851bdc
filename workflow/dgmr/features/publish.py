"""List the features under ``work/`` in ``results/features/manifest.json``, with their hashes."""

from pathlib import Path

from dgmr import artefact
from dgmr.files import sha256, write_json
from dgmr.params import Features
from dgmr.shards import MANIFEST


def publish(
    teacher: Path, target_folders: list[Path], calibration: Path, config: Features, output: Path
) -> None:
    """Write the manifest to ``output``; the files stay where they are."""
    files = [path for folder in target_folders for path in sorted(folder.iterdir())]
    listed_targets = _listed(files)
    listed_calibration = _listed(sorted(calibration.iterdir()))
    write_json(
        output / MANIFEST,
        {
            "teacher_sha256": artefact.provenance(teacher)["sha256"],
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
            "calibration_bytes": sum(p.stat().st_size for p in calibration.iterdir()),
        },
    )


def _listed(paths: list[Path]) -> dict[str, dict[str, str]]:
    return {path.name: {"path": str(path), "sha256": sha256(path)} for path in paths}
