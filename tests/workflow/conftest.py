"""Real Snakemake runs: one micro chain for the whole session, then copies of it and dry runs."""

import contextlib
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
TEACHER = "resources/teachers/micro"
_STAGE = {"train": "mlp", "samples": 640, "batch_size": 64, "lr": 1e-3, "min_lr": 1e-5}
PARAMS = {
    "teacher": {"model": f"local-dir:{TEACHER}"},
    "data": {
        "source": "fashion-mnist",
        "urls": "file",
        "n_samples": 300,
        "seed": 0,
        "shard_size": 100,
        "shards_per_job": 2,
        "eval": {"source": "fashion-mnist", "n_samples": 200},
    },
    "features": {
        "views": {"count": 2, "seed": 0},
        "calibration": {"samples": 64, "tokens": 16},
        "dtype": "bfloat16",
        "batch_size": 128,
    },
    "prune": {"ratio": 1.0, "max_ratio": 2.0, "compensate": "least_squares", "parts": 2},
    "distill": {"stages": {"mlp": _STAGE, "all": _STAGE | {"train": "all", "seed": 1}}},
    "evaluate": {"batch_size": 128, "speed_batch_size": 16, "speed_repeats": 2},
    "mlflow": {"tracking_uri": "sqlite:///mlflow.db", "experiment": "micro"},
}
# Nothing from the caller's shell may change what the runs do.
_FOREIGN = ("SNAKEMAKE_", "MLFLOW_", "SLURM_", "DVC_", "OMP_", "MKL_")
_ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "PYTHONHOME") and not name.startswith(_FOREIGN)
}
# On a busy machine, threads that wait must not take the cores from those that work.
_ENVIRONMENT["OMP_WAIT_POLICY"] = "PASSIVE"
_TIMEOUT_S = 900
_STATS_ROW = re.compile(r"^(\w+) +(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Done:
    """An ended command."""

    status: int
    output: str
    """Standard output and standard error, as they came."""
    seconds: float


@dataclass(frozen=True)
class Place:
    """A working folder with its own params.yaml, and the Snakefile that is run in it."""

    folder: Path
    snakefile: Path = REPOSITORY / "Snakefile"

    def __truediv__(self, path: str) -> Path:
        return self.folder / path

    def command(self, *arguments: str, cores: int | None = 2) -> list[str]:
        """The command line of Snakemake in this folder; ``cores`` None: the profile says."""
        binary = [sys.executable, "-m", "snakemake", "--snakefile", str(self.snakefile)]
        limit = [] if cores is None else ["--cores", str(cores)]
        return [*binary, "--directory", str(self.folder), *limit, *arguments]

    def start(
        self, output: Any, *arguments: str, cores: int | None = 2, **environment: str
    ) -> subprocess.Popen:
        """Start Snakemake, in a process group of its own; what it says goes to ``output``."""
        return subprocess.Popen(
            self.command(*arguments, cores=cores),
            cwd=self.folder,
            env=_ENVIRONMENT | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, cores: int | None = 2, **environment: str) -> Done:
        """Run Snakemake to its end."""
        started = time.monotonic()
        process = self.start(subprocess.PIPE, *arguments, cores=cores, **environment)
        try:
            output, _ = process.communicate(timeout=_TIMEOUT_S)
        except BaseException:
            _kill_group(process)
            raise
        return Done(process.returncode, output, time.monotonic() - started)

    def finish(self, *arguments: str, **environment: str) -> Done:
        """Run Snakemake to its end, which must be a good one."""
        done = self.run(*arguments, **environment)
        assert done.status == 0, done.output
        return done

    def kill_when(self, condition: Callable[[], bool], *arguments: str) -> None:
        """Start Snakemake; once ``condition()`` holds, SIGKILL it and all its jobs."""
        with (self.folder / "killed.txt").open("w") as said:
            process = self.start(said, *arguments)
            try:
                end = time.monotonic() + _TIMEOUT_S
                while not condition():
                    assert process.poll() is None, Path(said.name).read_text()
                    assert time.monotonic() < end, Path(said.name).read_text()
                    time.sleep(0.005)
            finally:
                _kill_group(process)
        assert process.returncode == -signal.SIGKILL

    def planned(self, *arguments: str) -> Counter:
        """Jobs by rule that a run would do now."""
        done = self.run("--quiet", "rules", "--dry-run", *arguments)
        assert done.status == 0, done.output
        if "Nothing to be done" in done.output:
            return Counter()
        _, _, table = done.output.partition("Job stats:")
        jobs = Counter({rule: int(count) for rule, count in _STATS_ROW.findall(table)})
        assert jobs.pop("total") == jobs.total(), done.output
        return jobs

    def edit(self, **changes: Any) -> "Place":
        """Set values in params.yaml by dotted names, in which ``__`` stands for a dot."""
        path = self.folder / "params.yaml"
        values = yaml.safe_load(path.read_text())
        for name, value in changes.items():
            *sections, last = name.split("__")
            section = values
            for key in sections:
                section = section.setdefault(key, {})
            section[last] = value
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return self

    def copy(self, folder: Path) -> "Place":
        """All of it, with the times of its files; Fashion-MNIST's 60,000 files are linked to."""
        images = [path for path in self.folder.glob("work/data/*/images") if path.is_dir()]
        skipped = {str(path) for path in images}
        shutil.copytree(
            self.folder,
            folder,
            symlinks=True,
            ignore=lambda where, names: {n for n in names if os.path.join(where, n) in skipped},
        )
        for path in images:
            (folder / path.relative_to(self.folder)).symlink_to(path.resolve())
        return Place(folder, self.snakefile)


def _kill_group(process: subprocess.Popen) -> None:
    """SIGKILL a process and all that it started; return when they are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(1000):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"processes of group {process.pid} outlive SIGKILL")


def _train_micro_teacher(folder: Path) -> None:
    """Enough of a teacher for its answers to depend on the image: 60 steps on Fashion-MNIST."""
    import timm
    import torch
    from dgmr import artefact, fashion_mnist

    torch.manual_seed(0)
    normalisation = {"mean": [fashion_mnist.MEAN] * 3, "std": [fashion_mnist.STD] * 3}
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=28,
        patch_size=7,
        embed_dim=32,
        depth=2,
        num_heads=2,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=10,
        pretrained_cfg_overlay=normalisation
        | {"input_size": [3, 28, 28], "crop_pct": 1.0, "interpolation": "bilinear"},
    )
    images, labels = fashion_mnist.load("train", folder / "unused")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = slice(step * 128, (step + 1) * 128)
        pixels = torch.tensor(images[rows])[:, None].expand(-1, 3, -1, -1) / 255
        batch = (pixels - fashion_mnist.MEAN) / fashion_mnist.STD
        loss = torch.nn.functional.cross_entropy(model(batch), torch.tensor(labels[rows]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    artefact.save(folder, model, {"made_by": "the tests"})


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    """A tiny ViT that has seen Fashion-MNIST, as a model artefact."""
    folder = tmp_path_factory.mktemp("teacher") / "micro"
    _train_micro_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def new_place(teacher_folder, tmp_path_factory):
    """Makes a working folder with the micro params, changed as told, and the teacher in it."""

    def make(**changes: Any) -> Place:
        place = Place(tmp_path_factory.mktemp("place"))
        (place / "params.yaml").write_text(yaml.safe_dump(copy.deepcopy(PARAMS), sort_keys=False))
        shutil.copytree(teacher_folder, place / TEACHER)
        return place.edit(**changes)

    return make


@pytest.fixture(scope="session")
def finished(new_place) -> Place:
    """The one micro chain that ran from end to end. Read it; to change it, take a ``finished_copy``."""
    place = new_place()
    done = place.finish()
    (place / "said.txt").write_text(done.output)
    return place


@pytest.fixture
def finished_copy(finished, tmp_path) -> Place:
    """A copy of the finished chain."""
    return finished.copy(tmp_path / "copy")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """Environment for commands: the caller's, without what would change the runs."""
    return dict(_ENVIRONMENT)
