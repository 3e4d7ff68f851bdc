"""A chain's results without the work, and what an MLflow store says of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dgmr
import tiny
from dgmr import artefact, params
from dgmr.keys import Keys
from dgmr.prune import prune_model
from dgmr.track.accounts import Room, rooms

STORE = "sqlite:///mlflow.db"
STEPS = [64 * (i + 1) for i in range(250)]
BLOCKS = 3
REPOSITORY = Path(dgmr.__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(dgmr.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


def make_params(experiment, uri=STORE, stages=None, sweep=None, **teacher):
    stage = {"train": "mlp", "samples": 16000, "lr": 1e-3}
    stages = stages or {"mlp": stage, "all": stage | {"train": "all", "lr": 1e-4}}
    values = {
        "teacher": {"model": "vit_tiny_patch16_224"} | teacher,
        "data": {"n_samples": 100, "urls": "file"},
        "prune": {"ratio": 1.0},
        "distill": {"stages": stages},
        "sweep": sweep or {},
        "mlflow": {"tracking_uri": uri, "experiment": experiment},
    }
    return params.validate(values)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def history(steps=STEPS, speed=100.0):
    return [
        {"step": i + 1, "samples": s, "lr": 1e-3 / s, "loss": 9 / s, "pooled": 4 / s}
        | {"patch_tokens": 5 / s, "images_per_s": speed + i}
        for i, s in enumerate(steps)
    ]


def make_results(folder, config=None):
    """Results of a chain, without weights but the student's."""
    config = config or make_params("any")
    blocks = {
        f"blocks.{i}.mlp": {"hidden_features": 768, "kept": 192, "gains": [0.3, 0.2]}
        | {"error_plain": 0.5 + i, "error_refit": 0.1 + i}
        for i in range(BLOCKS)
    }
    counts = {"rows": 120, "selected": 100, "url not file": 20}
    images = {"ok": 95, "<urlopen error [Errno -2]>": 5}  # as a ledger may have it
    models = ["teacher", "pruned", "mlp", "all"]
    write(folder / "teacher/provenance.json", {"stage": "teacher", "source": "x", "sha256": "t1"})
    write(folder / "data/metrics.json", {"samples": 95, "table": counts, "images": images})
    write(folder / "features/metrics.json", {"target_files": 1, "target_bytes": 1 << 40})
    write(folder / "prune/provenance.json", {"widths": {"blocks.0.mlp": 192}, "sha256": "p1"})
    write(folder / "prune/blocks.json", blocks)
    for stage in ("mlp", "all"):
        finish(folder, stage, config=config)
    for model in models:
        write(folder / f"evaluate/{model}.json", {"model": model, "sha256": "x", "top1": 81.5})
    write(folder / "evaluate/renamed.json", {"model": "renamed", "top1": 1.0})  # of other params
    speeds = {model: 100.0 * (i + 1) for i, model in enumerate(models)}
    write(folder / "evaluate/speed.json", {"device": "cpu", "threads": 2, "images_per_s": speeds})
    write(folder / "metrics.json", {"student.top1": 81.5, "speedup.images_per_s": 4.0})
    write(folder / "report.html", "<html>the report</html>")
    artefact.save(folder / "student", prune_model(tiny.vit(), 0.5), {"stage": "distill all"})
    for room in ("teacher", "data", "features", "prune", "evaluate", "report"):
        stamp(folder, room, config)
    return folder


def finish(folder, stage, rows=None, config=None):
    write(folder / "distill" / stage / "provenance.json", {"sha256": f"d-{stage}"})
    write(folder / "distill" / stage / "history.json", rows or history())
    stamp(folder, f"distill/{stage}", config or make_params("any"))


def stamp(folder, room, config):
    """As Snakemake does when the room is done with these params."""
    for name in Keys(config).stamps(room):
        write(folder / name, "")


def names(config):
    """Of all that MLflow is told of."""
    return [str(found) for found in rooms(Keys(config), Path("results"))]


def room(name, config, results):
    return Room(name, Keys(config), results)


def runs_of(stage, config):
    """Where its training checkpoints go."""
    return Path("work/distill") / Keys(config).distill(stage)


def run(*arguments, **options):
    """The command, begun."""
    command = [sys.executable, "-m", "dgmr", "track", *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, **options)


def in_environment(command, **options):
    """Run a program of this environment."""
    program = Path(sys.executable).with_name(command[0])
    return subprocess.run([program if program.exists() else command[0], *command[1:]], **options)


class Store:
    """What a store says of an experiment."""

    def __init__(self, experiment, uri=STORE):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        found = self.client.get_experiment_by_name(experiment)
        self.id = found and found.experiment_id

    def all(self):
        return self.client.search_runs([self.id])

    def of(self, point):
        """The runs of a point, or of the run itself."""
        return [run for run in self.all() if run.data.tags.get("dgmr.point", "") == point]

    def rooms(self, point=""):
        """The runs by room; each has one."""
        found = [run for run in self.of(point) if "dgmr.room" in run.data.tags]
        by_room = {run.data.tags["dgmr.room"]: run for run in found}
        assert len(by_room) == len(found), "a room has more than one run"
        return by_room

    def finished(self, point=""):
        """The chains' runs, and the rooms' by name; all are finished."""
        found = self.of(point)
        chains = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        by_room = self.rooms(point)
        assert len(by_room) + len(chains) == len(found)
        assert {run.info.status for run in found} == {"FINISHED"}
        return chains, by_room

    def points(self, run, metric):
        history = self.client.get_metric_history(run.info.run_id, metric)
        return sorted((point.step, point.value) for point in history)

    def artifacts(self, run):
        names = {}
        for file in self.client.list_artifacts(run.info.run_id):
            path = self.client.download_artifacts(run.info.run_id, file.path)
            names[file.path] = Path(path).read_text()
        return names

    def models(self):
        return self.client.search_logged_models([self.id])
