"""What ``work/`` no longer needs: results under keys that no run of the params has."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from dgmr.keys import Keys
from dgmr.params import Params

WORK = Path("work")
_KEY = re.compile(r"[0-9a-f]{12}(?=\.|$)")


class Unneeded(NamedTuple):
    """A file or folder that may go."""

    path: Path
    frees: int
    """Bytes; files that ``results/`` has too, as hard links, count nothing."""
    reason: str


def unneeded(params: Params) -> list[Unneeded]:
    """What may be removed from ``work/``: nothing of it is asked for with ``params``, sweep included.

    What other params would find again goes too: they would compute it anew. Downloaded images go once
    they are packed.
    """
    runs = Keys(params).runs
    used = {key for keys in runs for key in keys.of_work()}
    found = {
        path: "of other params or code"
        for path in sorted(
            [*WORK.glob("*/*"), *WORK.glob("evaluate/*/*"), *WORK.glob("benchmark/*/*")]
        )
        if (name := _KEY.match(path.name)) and name[0] not in used
    }
    for keys in runs:
        downloads = WORK / "data" / keys.downloads
        if downloads.exists() and Path("results/data", f"{keys.data}.stamp").exists():
            found[downloads] = "packed into shards"
    return [Unneeded(path, _frees(path), reason) for path, reason in found.items()]


def remove(found: list[Unneeded]) -> None:
    """Remove them from the disk."""
    for path, *_ in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _frees(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    sizes = (file.lstat() for file in files if file.is_symlink() or file.is_file())
    return sum(status.st_size for status in sizes if status.st_nlink == 1)
