"""Shards: webdataset tars, each with a Parquet of its rows, listed by a manifest.

::

    <folder>/
      00000.tar        <key>.png | .jpg | ..., and <key>.cls with the label where there is one
      00000.parquet    a row a sample, in the tar's order: key, offset, size, label, ...
      manifest.json    the shards: name, samples, bytes, sha256

The manifest is the only way a reader finds shards. Reading is map-style (shard, offset and size from
the Parquet), so that any order can be a pure function; plain ``webdataset.WebDataset`` reads the
same tars.
"""

import bisect
import hashlib
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image, ImageOps

from dgmr.errors import DgmrError
from dgmr.files import link_or_copy, read_json, replaced, sha256, write_json

MANIFEST = "manifest.json"
# By Pillow's name of the format; MPO: a JPEG with further pictures behind it, as cameras write.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_KEY = re.compile(r"[a-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Sample:
    """One image on its way into a shard."""

    key: str
    image: bytes
    """Encoded; decodes whole."""
    extension: str
    label: int | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """Further columns of the shard's Parquet, such as ``url`` and ``caption``."""


@dataclass(frozen=True)
class Shard:
    """A shard's line in the manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_shard(folder: Path, name: str, samples: Iterable[Sample]) -> Shard:
    """Write one shard's tar and Parquet into ``folder``; equal samples give equal bytes.

    Raises:
        DgmrError: a key is no ``[a-z0-9_-]{1,64}`` or comes twice.
    """
    tar = folder / f"{name}.tar"
    rows = []
    seen = set()
    with replaced(tar) as partial:
        with webdataset.TarWriter(str(partial), mtime=0, user="", group="") as writer:
            for sample in samples:
                if not _KEY.fullmatch(sample.key) or sample.key in seen:
                    raise DgmrError(
                        f"shard {name}: sample key {sample.key!r} comes twice or is not made of"
                        " 1 to 64 of a-z 0-9 _ -."
                    )
                seen.add(sample.key)
                members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
                if sample.label is not None:
                    members["cls"] = str(sample.label).encode()
                writer.write(members)
                rows.append(
                    {"key": sample.key, "label": sample.label}
                    | sample.columns
                    | {"sha256": hashlib.sha256(sample.image).hexdigest()}
                )
        offsets = _image_offsets(partial)
    for row in rows:
        row["offset"], row["size"] = offsets[row["key"]]
    with replaced(tar.with_suffix(".parquet")) as partial:
        table = pa.Table.from_pylist(rows) if rows else pa.table({"key": pa.array([], pa.string())})
        pq.write_table(table, partial)
    return Shard(name, len(rows), tar.stat().st_size, sha256(tar))


def _image_offsets(tar: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar) as archive:
        return {
            member.name.rpartition(".")[0]: (member.offset_data, member.size)
            for member in archive
            if not member.name.endswith(".cls")
        }


def write_manifest(folder: Path, shards: Iterable[Shard], **about: Any) -> None:
    """List ``shards`` in ``folder``'s manifest, with whatever else is to be said ``about`` them."""
    entries = [asdict(shard) for shard in shards]
    write_json(
        folder / MANIFEST,
        about | {"samples": sum(entry["samples"] for entry in entries), "shards": entries},
    )


def link_shard(source: Path, folder: Path, name: str) -> None:
    """Give a shard's two files a second name in ``folder``."""
    for suffix in (".tar", ".parquet"):
        link_or_copy(source / f"{name}{suffix}", folder / f"{name}{suffix}")


def first(folder: Path, samples: int) -> list[str]:
    """Names of ``folder``'s first shards that hold so many samples together, or of all."""
    names: list[str] = []
    for shard in _manifest(folder)["shards"]:
        if samples <= 0:
            break
        names.append(shard["name"])
        samples -= shard["samples"]
    return names


def _manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise DgmrError(f"{folder} has no {MANIFEST}: run the data stage first.")
    found: dict[str, Any] = read_json(folder / MANIFEST)
    return found


class ShardedImages:
    """Random access to the images of a manifest, or of some of its shards; no image is kept open.

    Safe to share with forked and spawned loader processes.
    """

    def __init__(
        self, folder: Path, shards: Iterable[str] | None = None, verify: bool = False
    ) -> None:
        """Open ``folder``'s shards, all or those named; ``verify`` compares their hashes too.

        Raises:
            DgmrError: the manifest or a shard is missing, or a shard is not the one listed.
        """
        self.folder = folder
        self.manifest = _manifest(folder)
        wanted = None if shards is None else set(shards)
        self.shards = [
            shard
            for shard in (Shard(**entry) for entry in self.manifest["shards"])
            if wanted is None or shard.name in wanted
        ]
        if missing := (wanted or set()) - {shard.name for shard in self.shards}:
            raise DgmrError(
                f"{folder / MANIFEST} lists no shard {', '.join(sorted(missing))}: run snakemake again."
            )
        for shard in self.shards:
            self._check(shard, verify)
        tables = [pq.read_table(folder / f"{shard.name}.parquet") for shard in self.shards]
        self._ends = list(itertools.accumulate(shard.samples for shard in self.shards))
        self.keys: list[str] = _column(tables, "key")
        self.labels: list[int | None] = _column(tables, "label")
        self._offsets: list[int] = _column(tables, "offset")
        self._sizes: list[int] = _column(tables, "size")

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, index: int) -> tuple[str, int]:
        """Shard name and position within it of sample ``index``."""
        position = bisect.bisect_right(self._ends, index)
        return self.shards[position].name, index - (self._ends[position - 1] if position else 0)

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image of sample ``index``."""
        shard, _ = self.locate(index)
        descriptor = os.open(self.folder / f"{shard}.tar", os.O_RDONLY)
        try:
            encoded = os.pread(descriptor, self._sizes[index], self._offsets[index])
        finally:
            os.close(descriptor)
        return decode(encoded)

    def _check(self, shard: Shard, verify: bool) -> None:
        tar = self.folder / f"{shard.name}.tar"
        if not tar.is_file() or not tar.with_suffix(".parquet").is_file():
            raise DgmrError(
                f"{tar} is listed in {MANIFEST} but its tar or Parquet is missing: delete"
                f" {self.folder / MANIFEST} and run snakemake again."
            )
        try:
            rows = pq.read_metadata(tar.with_suffix(".parquet")).num_rows
        except pa.ArrowInvalid:  # cut off
            rows = -1
        whole = rows == shard.samples and tar.stat().st_size == shard.bytes
        if not whole or (verify and sha256(tar) != shard.sha256):
            raise DgmrError(
                f"{tar} is not the shard that {MANIFEST} lists: delete"
                f" {self.folder / MANIFEST} and run snakemake again."
            )


def decode(encoded: bytes) -> Image.Image:
    """A whole RGB image, upright by its EXIF orientation.

    Raises:
        OSError, ValueError, SyntaxError: as PIL has it, the bytes are no whole image.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        if image.mode.startswith("I;16"):  # convert() would clip, not scale, 16 bits of grey
            return ImageOps.exif_transpose(image.point(lambda v: v * (1 / 256))).convert("RGB")
        return ImageOps.exif_transpose(image).convert("RGB")


def _column(tables: list[pa.Table], name: str) -> list[Any]:
    return [value for table in tables if table.num_rows for value in table[name].to_pylist()]
