"""Files are complete or absent: written under a temporary name, flushed, then renamed."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ORIGIN = "origin"
"""Key of a safetensors file's metadata: JSON on what the file was made from. There is no other key,
for safetensors writes several in random order, and equal content shall give equal bytes."""
_TEMPORARY = ".partial"
_DISCARDED = ".discarded"


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary path; when the block ends without error, flush it and rename it to ``path``.

    The temporary name is fixed, so what a killed writer left is overwritten, not piled up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + _TEMPORARY)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """As :func:`replaced`, for a folder: it holds all the block wrote, or what it held before.

    A kill between two renames can leave no folder at all, never a part of one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + _TEMPORARY)
    discarded = folder.with_name(folder.name + _DISCARDED)
    for leftover in (partial, discarded):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            _flush(path)
        _flush(partial)
        # Deleting takes steps, so it is done under another name: a half deleted folder is never seen.
        if folder.exists():
            folder.rename(discarded)
        partial.rename(folder)
        _flush(folder.parent)
    finally:
        for leftover in (partial, discarded):
            shutil.rmtree(leftover, ignore_errors=True)


def keep_only(folder: Path, kept: Iterable[Path]) -> None:
    """Delete all in ``folder`` that is not one of the folders ``kept``, nor leads to one or is in it."""
    kept = list(kept)
    for path in sorted(folder.glob("**/*"), reverse=True):
        if any(path.is_relative_to(one) or one.is_relative_to(path) for one in kept):
            continue
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(count: int) -> str:
    """Bytes with three significant digits and a decimal unit."""
    rounded = float(f"{count:.3g}")
    power = min(int(math.log10(max(rounded, 1))) // 3, 4)
    return f"{rounded / 1000**power:g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def link_or_copy(source: Path, target: Path) -> None:
    """Give ``source`` a second name ``target``: a hard link where the file system has them."""
    with replaced(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk, readable as any new file of this user is.

    Some libraries write theirs for the owner alone. Whether it can be written to is left alone: a linked
    file may be in DVC's cache too, which protects its files.
    """
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(path.stat().st_mode | 0o444 & ~umask)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
