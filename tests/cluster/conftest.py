"""A private Slurm of two nodes with eight GPUs each: all daemons on this machine, all files in one folder."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from workflow.conftest import new_place, teacher_folder  # noqa: F401 - fixtures

# Memory limits are Slurm's own to enforce: without cgroups, by looking once a second. The GPUs are
# any files, for Slurm only counts them.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
MpiDefault=none
MinJobAge=36000
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=64000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=64000 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = {
    "munged": "--foreground --key-file={0}/munge.key --socket={0}/munge.socket"
    " --pid-file={0}/munge.pid --log-file={0}/munge.log --seed-file={0}/munge.seed",
    "slurmctld": "-D",
    "slurmd -N n1": "-D",
    "slurmd -N n2": "-D",
}
# Snakemake's plugin takes SLURM_CONF away from what a job runs.
SRUN = """#!/bin/sh
SLURM_CONF={conf} exec {srun} "$@"
"""


class Slurm:
    """The daemons; ``environment`` is for those who would talk to them."""

    def __init__(self):
        # munged wants a folder into which nobody else writes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self._daemons = []
        conf = self.folder / "slurm.conf"
        with contextlib.ExitStack() as stack:
            free = [stack.enter_context(socket.socket()) for _ in range(3)]
            for each in free:
                each.bind(("", 0))
            ports = [each.getsockname()[1] for each in free]
        about = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
        conf.write_text(CONFIG.format(folder=self.folder, ports=ports, **about))
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        for name in ("state", "spool-n1", "spool-n2", "bin"):
            (self.folder / name).mkdir()
        srun = self.folder / "bin" / "srun"
        srun.write_text(SRUN.format(conf=conf, srun=shutil.which("srun")))
        srun.chmod(0o755)
        self.environment = {"SLURM_CONF": str(conf), "PATH": f"{self.folder}/bin:{self.path}"}

    def start(self):
        """Return when both nodes are idle."""
        for name, options in DAEMONS.items():
            with (self.folder / "said.txt").open("ab") as said:
                daemon = subprocess.Popen(
                    [*name.split(), *options.format(self.folder).split()],
                    env=os.environ | self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            self._daemons.append(daemon)
            time.sleep(0.5)
        until = time.monotonic() + 30
        while self.said("sinfo", "--noheader", "--format=%T") != "idle":
            if time.monotonic() > until or any(d.poll() is not None for d in self._daemons):
                text = (self.folder / "said.txt").read_text()
                raise RuntimeError(f"Slurm does not start: {text[-2000:]}")
            time.sleep(0.5)

    def stop(self):
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(30)
        shutil.rmtree(self.folder)

    def said(self, *command):
        """What a command of Slurm prints; nothing where it fails."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True
        ).stdout.strip()

    def state(self, job):
        """Of a job that runs, waits or has ended."""
        return self.said("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


@pytest.fixture(scope="session")
def slurm():
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    wanted = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
    if missing := [name for name in wanted if shutil.which(name, path=path) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root alone")
    slurm = Slurm()
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
