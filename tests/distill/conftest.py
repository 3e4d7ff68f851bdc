"""Short stages, in this process, in forks of one that has torch imported, or by the real command."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dgmr import artefact
from dgmr.distill.trainer import train
from dgmr.files import read_json
from dgmr.params import Running, Stage
from dgmr.prune import prune_model
from safetensors.torch import load_file
from tiny import data, features, teacher  # noqa: F401 - fixtures

HERE = Path(__file__).parent
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join((str(HERE.parents[1] / "workflow"), str(HERE.parent))),
    "OMP_NUM_THREADS": "1",
}
SHORT = {"train": "all", "samples": 32, "batch_size": 4, "lr": 1e-3, "warmup": 0.25}


@pytest.fixture(autouse=True)
def one_thread():
    """As the forks and the commands have: with another number of threads the last bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stage(**changes):
    return Stage.model_validate(SHORT | changes)


class Forks:
    """The process of ``forks.py``."""

    def __init__(self):
        command = [sys.executable, str(HERE / "forks.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, **pipes)
        self._running = set()

    def start(self, arguments, output, env=None, **hooks):
        request = {"run": arguments, "output": str(output), "env": env or {}, "hooks": hooks}
        pid = self._asked(request)
        self._running.add(pid)
        return pid

    def wait(self, pid, seconds=90):
        status = self._asked({"wait": pid, "seconds": seconds})
        if status is not None:
            self._running.discard(pid)
        return status

    def end(self):
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.communicate(timeout=20)

    def _asked(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="session")
def forks():
    found = Forks()
    yield found
    found.end()


class Place:
    """A teacher, its pruned student and the folder of what is made of them."""

    def __init__(self, folder, forks, *rooms):
        self.folder, self.forks = folder, forks
        self.teacher, self.parent, self.data, self.features = rooms

    def train(self, name, config, **running):
        """In this process; gives the artefact."""
        rooms = self.parent, self.teacher, self.data, self.features
        runs = running.pop("runs", self.runs(name))
        running = Running(**({"workers": 0} | running))
        train("stage", *rooms, config, self.folder / name, runs, running)
        return self.folder / name

    def arguments(self, name, config, **options):
        """Of the command."""
        rooms = {k: getattr(self, k) for k in ("parent", "teacher", "data", "features")}
        about = {"stage": "stage", "config": config.model_dump_json(), "runs": self.runs(name)}
        given = rooms | about | {"output": self.folder / name, "workers": 0} | options
        pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in given.items())
        return ["distill", "train", *(part for pair in pairs for part in pair)]

    def start(self, name, config, env=None, hooks=None, **options):
        """In a fork; gives the process id."""
        arguments = self.arguments(name, config, **options)
        return self.forks.start(arguments, self.folder / f"{name}.out", env, **(hooks or {}))

    def run(self, name, config, processes=1, hooks=None, seconds=90, **options):
        """In so many forks, until all have ended; gives the status of each.

        ``hooks`` are those of all, or a list with each one's own.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        pids = []
        for rank in range(processes):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            env = {k: str(v) for k, v in group.items()} | address if processes > 1 else None
            own = hooks[rank] if isinstance(hooks, list) else hooks
            pids.append(self.start(name, config, env, own, **options))
        return [self.forks.wait(pid, seconds) for pid in pids]

    def done(self, name, config, processes=1, **options):
        """As :meth:`run`, and all went well; gives the artefact."""
        statuses = self.run(name, config, processes, **options)
        assert statuses == [0] * processes, self.said(name)
        return self.folder / name

    def command(self, name, config, **options):
        """The real command, begun."""
        return subprocess.Popen(
            [sys.executable, "-m", "dgmr", *self.arguments(name, config, **options)],
            env=os.environ | ENVIRONMENT,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / f"{name}.out").open("ab"),
            start_new_session=True,
        )

    def said(self, name):
        return (self.folder / f"{name}.out").read_text()

    def runs(self, name):
        return self.folder / f"{name}-runs"

    def run_folder(self, name):
        """Where the only run of that name keeps its checkpoints."""
        (found,) = self.runs(name).iterdir()
        return found

    def steps(self, name):
        """Steps of the checkpoints that are there."""
        return sorted(int(path.name[5:]) for path in self.run_folder(name).glob("step-????????"))

    def checkpoint(self, name):
        """Bytes of the newest training checkpoint."""
        return sorted(self.run_folder(name).glob("step-????????/state.safetensors"))[
            -1
        ].read_bytes()

    def weights(self, name):
        return load_file(self.folder / name / "model.safetensors")

    def bytes(self, name):
        return (self.folder / name / "model.safetensors").read_bytes()

    def history(self, name):
        return read_json(self.folder / name / "history.json")


@pytest.fixture(scope="session")
def parent(tmp_path_factory, teacher):  # noqa: F811
    folder = tmp_path_factory.mktemp("distill") / "pruned"
    artefact.save(folder, prune_model(artefact.load(teacher), 0.5), {"stage": "prune"})
    return folder


@pytest.fixture
def place(request, tmp_path, teacher, parent, data, features):  # noqa: F811
    class Lazy:
        """Only those who ask for a fork have the process started."""

        def __getattr__(self, name):
            return getattr(request.getfixturevalue("forks"), name)

    return Place(tmp_path, Lazy(), teacher, parent, data, features)


@pytest.fixture
def run(place):
    """Train a short stage in this process; gives the artefact and its history."""

    def run(name="stage", running=None, **changes):
        folder = place.train(name, stage(**changes), **(running or {}))
        return folder, place.history(name)

    return run
