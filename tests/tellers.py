"""Tellers that can be started by the hundred: forks of a process that has imported all they need."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import dgmr
import pytest
from dgmr import cli
from dgmr.track import store, tell

PATHS = [str(Path(dgmr.__file__).parents[1]), str(Path(__file__).parent)]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "tellers",
        "alembic.command",
        "dgmr.track.served",
        "mlflow.models",
        "mlflow.store.artifact.local_artifact_repo",
        "mlflow.store.artifact.mlflow_artifacts_repo",
        "mlflow.store.tracking.rest_store",
        "mlflow.store.tracking.sqlalchemy_store",
    ]
)


def start(folder, *arguments, naive=False):
    """``dgmr track`` with these arguments in a working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(PATHS))
        forkserver.ensure_running()
    process = FORKS.Process(target=_run, args=(folder, list(map(str, arguments)), naive))
    process.start()
    return process


def _run(folder, arguments, naive):
    os.chdir(folder)
    log = os.open("tellers.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if naive:
        store.Chain.tell = _tell_naively
        tell.FileLock = _NoLock
    sys.argv = ["dgmr", "track", *arguments]
    cli.main()


class _NoLock:
    def __init__(self, _path):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def _tell_naively(self, room, account):
    """As one would at first: what is there was told."""
    if not any(run.data.tags["dgmr.room"] == room for run in self.children):
        run = self._create(room, account)
        self._fill(run, set(), account)
        self.client.set_terminated(run.info.run_id)
