"""What this machine has to share between jobs, and whether a run that left its lock still lives."""

import contextlib
import fcntl
import logging
import os
import shutil
from glob import glob
from pathlib import Path

import psutil

SNAKEMAKE = Path(".snakemake")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_alive: list[int] = []
log = logging.getLogger(__name__)


def resources() -> dict[str, int]:
    """``mem_mb`` (MB of memory) and ``gpu`` (NVIDIA GPUs) that jobs on this machine have to share.

    Without torch, for Snakemake asks at parse time: a container's limit counts, and of the GPUs those
    that CUDA_VISIBLE_DEVICES leaves.
    """
    memory = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no cgroups, or "max"
        memory = min(memory, int(_CGROUP_LIMIT.read_text()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = glob("/dev/nvidia[0-9]*")
    if visible is not None:
        gpus = [name for name in visible.split(",") if name not in ("", "-1")]
    return {"mem_mb": memory // 1_000_000, "gpu": len(gpus)}


def release_lock_of_the_dead() -> None:
    """Remove the lock on the working folder that a killed Snakemake left behind.

    Snakemake's own lock is a file, which outlives a SIGKILL. So every run holds a lock of the kernel's
    besides, which does not: where nobody holds it, no run is alive.
    """
    SNAKEMAKE.mkdir(exist_ok=True)
    descriptor = os.open(SNAKEMAKE / "alive.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks = SNAKEMAKE / "locks"
        if locks.is_dir() and any(locks.iterdir()):
            log.warning(
                "The run before this one was killed: its lock is removed, and the work goes on."
            )
            shutil.rmtree(locks)
    except OSError:  # another run is alive, or the file system has no such locks
        pass
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return
    _alive.append(descriptor)  # until this process ends, however it ends
