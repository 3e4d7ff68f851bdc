"""Targets: what the teacher said of each (sample, view), cached on disk shard by shard.

::

    results/features/manifest.json      the teacher's hash, the views, every file with its hash
    work/features/<key>/targets/<job>/00000.view0.safetensors     pooled [n, D], patch_tokens [n, T, D]
    work/features/<key>/calibration/<mlp>.safetensors             inputs [tokens, N]

Row i of a targets file is row i of the shard of that name.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dgmr.errors import DgmrError
from dgmr.files import read_json, sha256
from dgmr.models import Outputs
from dgmr.shards import MANIFEST, Shard


def file_name(shard: str, view: int) -> str:
    """Name of the targets file of a shard's view."""
    return f"{shard}.view{view}.safetensors"


class Manifest:
    """The features room's manifest; checks that its files are the ones it lists."""

    def __init__(self, folder: Path) -> None:
        """Read ``folder``'s manifest.

        Raises:
            DgmrError: there is none.
        """
        if not (folder / MANIFEST).is_file():
            raise DgmrError(f"{folder} has no {MANIFEST}: run the features stage first.")
        self._content: dict[str, Any] = read_json(folder / MANIFEST)
        self.teacher_sha256: str = self._content["teacher_sha256"]
        self.views: dict[str, Any] = self._content["views"]

    def check_teacher(self, weights_sha256: str) -> None:
        """Refuse features of another teacher than the one with these weights.

        Raises:
            DgmrError: they are another's.
        """
        if self.teacher_sha256 != weights_sha256:
            raise DgmrError(
                "results/features was made by another teacher than results/teacher holds:"
                " run snakemake again."
            )

    def target(self, shard: Shard, view: int) -> Path:
        """The verified targets file of a shard's view.

        Raises:
            DgmrError: it is missing, damaged, or of a shard of other images.
        """
        path = self._verified("targets", file_name(shard.name, view))
        if self._content["targets"][path.name]["shard_sha256"] != shard.sha256:
            raise DgmrError(
                f"{path} was made of another shard {shard.name} than the data room holds:"
                " run snakemake again."
            )
        return path

    def calibration(self, mlp: str) -> Path:
        """The verified file of an MLP's calibration inputs.

        Raises:
            DgmrError: it is missing or damaged.
        """
        return self._verified("calibration", f"{mlp}.safetensors")

    def _verified(self, kind: str, name: str) -> Path:
        entry = self._content[kind].get(name)
        if entry is None:
            raise DgmrError(f"{name} is not among the {kind} that {MANIFEST} lists.")
        path = Path(entry["path"])
        if not path.is_file() or sha256(path) != entry["sha256"]:
            raise DgmrError(
                f"{path} is missing or is not the file that results/features/{MANIFEST} lists:"
                " delete it and its folder, and run snakemake again."
            )
        return path


class Targets:
    """Random access to the cached outputs, by shard, row and view.

    Files are opened on first use, in the process that reads.
    """

    def __init__(self, paths: dict[tuple[str, int], Path]) -> None:
        """``paths``: verified file by (shard, view)."""
        self._paths = paths
        self._files: dict[tuple[str, int], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for spawned loader processes."""
        return {"_paths": self._paths, "_files": {}}

    def read(self, shard: str, row: int, view: int) -> Outputs:
        """Pooled output ``[D]`` and patch tokens ``[T, D]`` of a (sample, view), as stored."""
        file = self._files.get((shard, view))
        if file is None:
            file = safe_open(self._paths[shard, view], framework="pt")
            self._files[shard, view] = file
        return Outputs(*(self._row(file, name, row) for name in Outputs._fields))

    @staticmethod
    def _row(file: Any, name: str, row: int) -> Tensor:
        values: Tensor = file.get_slice(name)[row : row + 1]
        return values[0]


def dtype(name: str) -> torch.dtype:
    """The torch dtype that ``features.dtype`` names."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
