"""Pack images into shards: every image decodes whole, what does not is counted and left out."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from dgmr.files import replaced, replaced_folder, write_json
from dgmr.shards import EXTENSIONS, Sample, decode, write_shard

SHARDS, LEDGER = "shards.json", "ledger.parquet"
# What Pillow raises for bytes that are no whole image (RuntimeError: its AVIF decoder),
# decompression bombs included.
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


class Unavailable(Exception):
    """There is no image for a row; the message says why, for the ledger."""


Row = dict[str, Any]
Fetch = Callable[[Row], bytes]


def pack(
    rows: Path,
    shards: list[str],
    output: Path,
    *,
    table_folder: Path,
    downloaded: Path | None,
    image_size: int | None,
) -> None:
    """Write ``shards`` from the selected ``rows`` (Parquet) to the folder ``output``.

    Images come from ``downloaded``, img2dataset's output folder, or, where that is None, from the
    files the rows' URLs name, relative to ``table_folder``. Beside the shards stand
    ``shards.json``, their part of the manifest, and ``ledger.parquet``: what became of each row.
    """
    table = pq.read_table(rows)
    fetch = _local(table_folder) if downloaded is None else _downloaded(downloaded)
    ledger: list[Row] = []
    with replaced_folder(output) as folder:
        written = []
        for name in shards:
            wanted = table.filter(pc.equal(table["shard"], name)).to_pylist()
            written.append(write_shard(folder, name, _samples(wanted, fetch, image_size, ledger)))
        write_json(folder / SHARDS, [vars(shard) for shard in written])
        with replaced(folder / LEDGER) as partial:
            pq.write_table(pa.Table.from_pylist(ledger), partial)


def normalised(encoded: bytes, image_size: int | None) -> tuple[bytes, str]:
    """The image as it is stored, and its file extension.

    JPEG, PNG and WebP are kept to the byte unless they must shrink to a shorter side of
    ``image_size`` pixels; other formats become PNG, losslessly.

    Raises:
        one of BROKEN: the bytes are no whole image.
    """
    image = decode(encoded)
    with Image.open(io.BytesIO(encoded)) as original:
        extension = EXTENSIONS.get(original.format or "")
    shrinks = image_size is not None and min(image.size) > image_size
    if extension and not shrinks:
        return encoded, extension
    if shrinks:
        assert image_size is not None
        scale = image_size / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if extension == "jpg":
        image.save(buffer, "JPEG", quality=95)
        return buffer.getvalue(), "jpg"
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _samples(
    rows: list[Row], fetch: Fetch, image_size: int | None, ledger: list[Row]
) -> Iterator[Sample]:
    for row in rows:
        status = "ok"
        try:
            image, extension = normalised(fetch(row), image_size)
            about = {
                name: value for name, value in row.items() if name not in ("sample_key", "shard")
            }
            yield Sample(row["sample_key"], image, extension, columns=about)
        except Unavailable as reason:
            status = str(reason)
        except BROKEN as error:
            status = f"broken image: {error}"
        ledger.append(
            {"key": row["sample_key"], "shard": row["shard"], "url": row["url"], "status": status}
        )


def _local(table_folder: Path) -> Fetch:
    def fetch(row: Row) -> bytes:
        path = table_folder / unquote(urlparse(row["url"]).path)
        try:
            return path.read_bytes()
        except OSError as error:
            raise Unavailable(f"unreadable file: {error.strerror}") from None

    return fetch


def _downloaded(folder: Path) -> Fetch:
    """From img2dataset's tars (image and ``.json`` a sample) and Parquets (a row a URL)."""
    places: dict[str, tuple[Path, int, int]] = {}
    errors: dict[str, str] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            images: dict[str, tuple[Path, int, int]] = {}
            for member in archive:
                name, _, extension = member.name.rpartition(".")
                if extension == "json":
                    about = archive.extractfile(member)
                    assert about is not None  # a regular file
                    places[json.load(about)["sample_key"]] = images[name]
                elif extension != "txt":
                    images[name] = (tar, member.offset_data, member.size)
    for parquet in folder.glob("*.parquet"):
        for row in pq.read_table(parquet).to_pylist():
            errors[row["sample_key"]] = str(row["error_message"])

    def fetch(row: Row) -> bytes:
        if row["sample_key"] not in places:
            raise Unavailable(f"not downloaded: {errors.get(row['sample_key'], 'no answer')}")
        tar, offset, size = places[row["sample_key"]]
        with tar.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    return fetch
