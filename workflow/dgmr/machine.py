"""What this machine has to share between jobs, and whether a run that left its lock still lives."""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import subprocess
from glob import glob
from pathlib import Path

import psutil

SNAKEMAKE = Path(".snakemake")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
RUN = "DGMR_RUN"
"""Environment variable of the jobs: the working folder of the run that started them."""
_SAVING_S = 120
_CLUSTER = "cluster"
_alive: list[int] = []
log = logging.getLogger(__name__)


def resources() -> dict[str, int]:
    """``mem_mb`` (MB of memory), ``gpu`` (NVIDIA GPUs) and ``mlflow`` (tellers) that jobs here have to share.

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
    return {"mem_mb": memory // 1_000_000, "gpu": len(gpus), "mlflow": 1}


def take_over_from_the_dead(is_local: bool = True) -> None:
    """Remove the lock that a killed Snakemake left in the working folder, and end the jobs it left.

    ``is_local``: this run's jobs are this machine's, not a cluster's.

    Snakemake's own lock is a file, which outlives a SIGKILL. So every run holds a lock of the kernel's
    besides, which does not: where nobody holds it, no run is alive. Some file systems have such locks
    for each machine apart, so the lock of another machine's run is left to the user.
    """
    SNAKEMAKE.mkdir(exist_ok=True)
    descriptor = os.open(SNAKEMAKE / "alive.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _take_over(descriptor, is_local)
    except OSError:  # another run is alive, or the file system has no such locks
        pass
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for another that is still at the above
    except OSError:
        os.close(descriptor)
        return
    _alive.append(descriptor)  # until this process ends, however it ends


def _take_over(descriptor: int, is_local: bool) -> None:
    locks, here = SNAKEMAKE / "locks", socket.gethostname()
    if locks.is_dir() and any(locks.iterdir()):
        there, _, kind = os.pread(descriptor, 256, 0).decode().partition(" ")
        if there != here:
            log.warning("A run on %s has not ended here, or was killed.", there or "some machine")
            return
        log.warning(
            "The run before this one was killed: its lock is removed, and the work goes on."
        )
        shutil.rmtree(locks)
        if kind == _CLUSTER:
            _cancel_orphans()
    _end_orphans()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (here if is_local else f"{here} {_CLUSTER}").encode(), 0)


def _cancel_orphans() -> None:
    """The same of jobs that Slurm still has: those that Snakemake's plugin submitted from this folder."""
    command = ["squeue", "--me", "--noheader", "--format=%A|%k|%Z"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):  # no Slurm here, or it does not answer
        return
    jobs = [line.split("|", 2) for line in told.splitlines() if line.count("|") >= 2]
    here = os.getcwd()
    orphans = [job for job, rule, folder in jobs if rule.startswith("rule_") and folder == here]
    if orphans:
        log.warning("Jobs that it left in Slurm are cancelled: %s.", " ".join(orphans))
        subprocess.run(["scancel", *orphans], check=False)


def _end_orphans() -> None:
    """End the jobs that a killed run left at work in this folder; training saves a checkpoint then.

    Nobody waits for them, and with other params they would write into the rooms that this run makes.
    """
    here = os.getcwd()
    orphans = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if process.environ().get(RUN) == here and process.pid != os.getpid():
                orphans.append(process)
    if orphans:
        log.warning("Jobs that it left at work are ended first.")
    for process in orphans:
        with contextlib.suppress(psutil.Error):
            process.terminate()
            process.resume()  # after Ctrl-Z
    _, stubborn = psutil.wait_procs(orphans, _SAVING_S)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stubborn, 10)
