"""Targets: what the teacher answered about each (sample, view), cached on disk shard by shard.

::

    results/features/manifest.json      the teacher's hash, what was asked about which pixels, and
                                        every file with its hash
    work/features/<key>/targets/<job>/00000.view0.safetensors     a tensor an answer, and the pixels
    work/features/<key>/calibration/<mlp>.safetensors             inputs [images, tokens, N]

Row i of a targets file is row i of the shard of that name. :mod:`dgmr.answers` has the answers' names
and shapes; ``pixels`` ``[n, C, H, W]`` uint8 are there if the section ``features`` wants them.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgmr.errors import DgmrError
from dgmr.files import read_json, readable, sha256
from dgmr.params import Features
from dgmr.shards import MANIFEST, Shard
from dgmr.weights import Spans, spans

PIXELS = "pixels"


class Row(NamedTuple):
    """A (sample, view): the sample by its shard and its place in it."""

    shard: str
    row: int
    view: int


def file_name(shard: str, view: int) -> str:
    """Name of the targets file of a shard's view."""
    return f"{shard}.view{view}.safetensors"


def about(teacher_sha256: str, transform: dict[str, Any], config: Features) -> dict[str, Any]:
    """What the targets depend on besides the images; JSON.

    ``transform`` as :meth:`dgmr.views.ViewTransform.about` has it.
    """
    asked = {"patch_tokens", "blocks", "dtype", "pixels", "precision"}
    return {
        "teacher_sha256": teacher_sha256,
        "transform": transform,
        "asked": config.model_dump(mode="json", include=asked),
    }


def check_space(wanted: int, folder: Path) -> None:
    """Refuse to begin what the disk of ``folder`` cannot hold; ``wanted`` in bytes.

    Raises:
        DgmrError: naming both sizes and what makes the targets smaller.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise DgmrError(
            f"features: the targets take {readable(wanted)}, but the disk of {folder} has"
            f" {readable(free)} left: lower features.views.count, ask for fewer patch_tokens or"
            " blocks, or choose features.cache: none."
        )


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
        self.teacher_sha256: str = self._content["about"]["teacher_sha256"]
        self.config = Features.model_validate(self._content["config"])
        self.about: dict[str, Any] = self._content["about"]

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

    def check_transform(self, transform: dict[str, Any]) -> None:
        """Refuse targets of other pixels than those of ``transform``.

        Raises:
            DgmrError: naming what differs.
        """
        theirs = self.about["transform"]
        if different := [name for name in transform if transform[name] != theirs.get(name)]:
            name = different[0]
            raise DgmrError(
                f"results/features is about other views: {name} was {theirs.get(name)}, and is"
                f" {transform[name]} now: run snakemake again."
            )

    def targets(self, shards: Iterable[Shard]) -> dict[tuple[str, int], Path]:
        """The targets file of every view of the shards that have samples; not verified.

        Raises:
            DgmrError: one is missing, or of a shard of other images.
        """
        found = {}
        for shard in shards:
            for view in range(self.config.views.count if shard.samples else 0):
                name = file_name(shard.name, view)
                path = self._path("targets", name)
                if self._content["targets"][name]["shard_sha256"] != shard.sha256:
                    raise DgmrError(
                        f"{path} was made of another shard {shard.name} than the data room holds:"
                        " run snakemake again."
                    )
                found[shard.name, view] = path
        return found

    def verify_targets(self) -> None:
        """Read every targets file and compare its hash.

        Raises:
            DgmrError: one is missing or damaged.
        """
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda name: self._verified("targets", name), self.target_hashes):
                pass

    @property
    def target_hashes(self) -> dict[str, str]:
        """SHA-256 of every targets file, by its name."""
        return {name: entry["sha256"] for name, entry in self._content["targets"].items()}

    def calibration(self, mlp: str) -> Path:
        """The verified file of an MLP's calibration inputs.

        Raises:
            DgmrError: it is missing or damaged.
        """
        return self._verified("calibration", f"{mlp}.safetensors")

    def _path(self, kind: str, name: str) -> Path:
        entry = self._content[kind].get(name)
        if entry is None:
            raise DgmrError(f"{name} is not among the {kind} that {MANIFEST} lists.")
        path = Path(entry["path"])
        if not path.is_file():
            raise DgmrError(_damaged(path))
        return path

    def _verified(self, kind: str, name: str) -> Path:
        path = self._path(kind, name)
        if sha256(path) != self._content[kind][name]["sha256"]:
            raise DgmrError(_damaged(path))
        return path


def _damaged(path: Path) -> str:
    return (
        f"{path} is missing or is not the file that results/features/{MANIFEST} lists:"
        " delete it and its folder, and run snakemake again."
    )


class Targets:
    """Random access to the cached answers and pixels.

    Rows are read, not mapped: what was read before takes no memory of the process. No file is kept
    open.
    """

    def __init__(self, paths: dict[tuple[str, int], Path]) -> None:
        """``paths``: file by (shard, view)."""
        self._paths = paths
        self._spans: dict[tuple[str, int], dict[str, Spans]] = {}

    def read(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """By name, one row for each of ``rows``, as stored: ``[len(rows), ...]``.

        Raises:
            DgmrError: a file is not what it was any more.
            IndexError: a row is none of its file.
        """
        found = self._found((rows[0].shard, rows[0].view))
        batch = {
            name: torch.empty([len(rows), span.row_bytes], dtype=torch.uint8)
            for name, span in found.items()
        }
        buffers = {name: tensor.view(-1).numpy().data for name, tensor in batch.items()}
        for index, (shard, row, view) in enumerate(rows):
            lying = self._found((shard, view))
            descriptor = os.open(self._paths[shard, view], os.O_RDONLY)
            try:
                for name, span in lying.items():
                    if not 0 <= row < span.rows:
                        raise IndexError(f"{self._paths[shard, view]} has no row {row}")
                    target = buffers[name][index * span.row_bytes : (index + 1) * span.row_bytes]
                    count = os.preadv(descriptor, [target], span.offset + row * span.row_bytes)
                    if count != span.row_bytes:
                        raise DgmrError(_damaged(self._paths[shard, view]))
            finally:
                os.close(descriptor)
        return {
            name: tensor.view(found[name].dtype).view(len(rows), *found[name].row)
            for name, tensor in batch.items()
        }

    def _found(self, file: tuple[str, int]) -> dict[str, Spans]:
        if file not in self._spans:
            try:
                self._spans[file] = spans(self._paths[file])
            except (OSError, ValueError):  # gone, or cut off in its header
                raise DgmrError(_damaged(self._paths[file])) from None
        return self._spans[file]
