"""Files are complete or absent, and one writer's: written under a temporary name, flushed, then renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from dgmr.errors import DgmrError

ORIGIN = "origin"
"""Key of a safetensors file's metadata: JSON on what the file was made from. There is no other key,
for safetensors writes several in random order, and equal content shall give equal bytes."""
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers of a full disk."""
_TEMPORARY = ".partial"
_DISCARDED = ".discarded"
_SCRATCH = ".scratch"
_LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}
_LONGEST_NAP_S = 1.0
_FLUSHED_AT_ONCE = 16
log = logging.getLogger(__name__)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a temporary path; when the block ends without error, flush it and rename it to ``path``.

    The temporary name is fixed, so what a killed writer left is overwritten, not piled up. A second
    writer of ``path`` waits until the first one has ended.

    Raises:
        DgmrError: the disk is full; ``path`` is left as it was.
    """
    partial = path.with_name(path.name + _TEMPORARY)
    with alone(path):
        try:
            yield partial
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_files(folder: Path, last: str) -> Iterator[Path]:
    """As :func:`replaced`, for files and folders that belong together: give a temporary folder, and move
    what the block wrote there into ``folder``, where it replaces what has the same names.

    ``last`` is one of them, and vouches for the others: it is the first to go and the last to come. A
    kill between two renames can leave it absent, never beside others than its own.
    """
    partial, discarded = (folder / (last + suffix) for suffix in (_TEMPORARY, _DISCARDED))
    with alone(folder / last):
        try:
            for leftover in (partial, discarded):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            yield partial
            _flush(*partial.rglob("*"))
            names = sorted(path.name for path in partial.iterdir() if path.name != last)
            discarded.mkdir()
            with contextlib.ExitStack() as undone:
                for name in (last, *names):
                    if (folder / name).exists():
                        _move(folder / name, discarded / name, undone)
                for name in (*names, last):
                    _move(partial / name, folder / name, undone)
                undone.pop_all()  # all went well
            _flush(folder)
        finally:
            # Deleting takes steps, so it is done under other names: a half deleted folder is never seen.
            for leftover in (partial, discarded):
                shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """As :func:`replaced`, for a folder: it holds all the block wrote, or what it held before.

    A kill between two renames can leave no folder at all, never a part of one.
    """
    with replaced_files(folder.parent, folder.name) as scratch:
        (scratch / folder.name).mkdir()
        yield scratch / folder.name


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Give an empty folder on the disk of ``path``, which is gone after the block; its name is fixed, too.

    Raises:
        DgmrError: the disk is full.
    """
    folder = path.with_name(path.name + _SCRATCH)
    with alone(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def alone(
    path: Path, limit_s: float = math.inf, waiting: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Within the block no other process, of any machine that sees the file system, is in one for ``path``.

    Waits for the one that is. The lock is the kernel's: it ends with its process, however that ends,
    and is not passed on to forks, such as a loader's, which may live longer. ``<path>.lock`` says who
    holds it, and is gone after the block. File systems without locks do without.

    Args:
        path: what only one may write.
        limit_s: how long to wait.
        waiting: called now and then while waiting.

    Raises:
        DgmrError: another held it to the limit, or the disk is full.
    """
    lock = path.with_name(path.name + _LOCK)
    until, nap_s, is_told = time.monotonic() + limit_s, 0.01, False
    with _disk_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with lock.open("a+b", buffering=0) as file:
                if _locked(file, lock):
                    try:
                        file.truncate(0)
                        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                        yield
                    finally:
                        # Before the lock ends: who has waited for this file sees that it is none any more.
                        lock.unlink(missing_ok=True)
                    return
                file.seek(0)
                holder = file.read().decode() or "another process"
            if time.monotonic() >= until:
                raise DgmrError(
                    f"{path} is still being written by {holder}, after {limit_s / 60:g} minutes of waiting:"
                    " wait until that has ended, or end it, and run snakemake again."
                )
            if not is_told:
                log.info("%s is being written by %s: waiting until that has ended.", path, holder)
                is_told = True
            waiting()
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, _LONGEST_NAP_S)


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
    """Give ``source`` a second name ``target``, not atomically: a hard link where the file system has them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _locked(file: BinaryIO, lock: Path) -> bool:
    """Whether ``file`` could be locked, and is still what ``lock`` names: its holder removes it."""
    try:
        # Not flock: that is of the open file, which forks share, and NFS knows it only lately.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            raise
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False


def _move(source: Path, target: Path, undone: contextlib.ExitStack) -> None:
    source.rename(target)
    undone.callback(target.rename, source)


@contextlib.contextmanager
def _disk_told(path: Path, *also: int) -> Iterator[None]:
    """Tell of a disk that is full, or of the error numbers ``also``, in a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE.union(also):
            raise
        raise DgmrError(
            f"{path} cannot be written ({os.strerror(error.errno)}): make room on its disk, or mend it,"
            " and run snakemake again."
        ) from error


def _flush(*paths: Path) -> None:
    """Bring files and folders to the disk, readable as any new file of this user is.

    Some libraries write theirs for the owner alone. Whether it can be written to is left alone: a linked
    file may be in DVC's cache too, which protects its files.
    """
    umask = os.umask(0)
    os.umask(umask)

    def flush(path: Path) -> None:
        if path.is_file():
            path.chmod(path.stat().st_mode | 0o444 & ~umask)
        with _disk_told(path, errno.EIO):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    if len(paths) == 1:
        return flush(*paths)
    # The file system's journal takes those that wait side by side together.
    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
        for _ in pool.map(flush, paths):
            pass
