"""The MLflow store says what the files say: once, and whole."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dgmr import params, track
from dgmr.errors import DgmrError
from filelock import FileLock

STORE = "sqlite:///mlflow.db"
STEPS = [64 * (i + 1) for i in range(250)]
BLOCKS = 3


def make_params(experiment, uri=STORE, **teacher):
    stage = {"train": "mlp", "samples": 16000, "lr": 1e-3}
    values = {
        "teacher": {"model": "vit_tiny_patch16_224"} | teacher,
        "data": {"n_samples": 100, "urls": "file"},
        "prune": {"ratio": 1.0},
        "distill": {"stages": {"mlp": stage, "all": stage | {"train": "all", "lr": 1e-4}}},
        "mlflow": {"tracking_uri": uri, "experiment": experiment},
    }
    return params.validate(values)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def make_results(folder):
    """Results of a chain, without weights."""
    history = [
        {"step": i, "samples": s, "lr": 1e-3 / s, "loss": 9 / s, "pooled": 4 / s}
        | {"patch_tokens": 5 / s, "images_per_s": 100.0 + i}
        for i, s in enumerate(STEPS)
    ]
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
        write(folder / "distill" / stage / "provenance.json", {"sha256": f"d-{stage}"})
        write(folder / "distill" / stage / "history.json", history)
    for model in models:
        write(folder / f"evaluate/{model}.json", {"model": model, "sha256": "x", "top1": 81.5})
    write(folder / "evaluate/renamed.json", {"model": "renamed", "top1": 1.0})  # of other params
    speeds = {model: 100.0 * (i + 1) for i, model in enumerate(models)}
    write(folder / "evaluate/speed.json", {"device": "cpu", "threads": 2, "images_per_s": speeds})
    write(folder / "metrics.json", {"student.top1": 81.5, "speedup.images_per_s": 4.0})
    write(folder / "report.html", "<html>the report</html>")
    return folder


@pytest.fixture(scope="module", autouse=True)
def workspace(tmp_path_factory):
    """The working folder, whose one store all tests share; each has an experiment of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("workspace"))
        yield Path.cwd()


@pytest.fixture
def results(tmp_path):
    return make_results(tmp_path / "results")


@pytest.fixture
def experiment(request):
    return request.node.name


def connect():
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=STORE)


def search(experiment):
    client = connect()
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def runs(experiment):
    """The chains' runs, and the rooms' by name; all are finished."""
    found = search(experiment)
    chains = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in found if run not in chains]
    by_room = {run.data.tags["dgmr.room"]: run for run in children}
    assert len(by_room) == len(children), "a room has more than one run"
    assert {run.info.status for run in found} == {"FINISHED"}
    return chains, by_room


def points(run, metric):
    history = connect().get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def artifacts(run):
    client, names = connect(), {}
    for file in client.list_artifacts(run.info.run_id):
        names[file.path] = Path(client.download_artifacts(run.info.run_id, file.path)).read_text()
    return names


def test_store_says_what_the_files_say(results, experiment, workspace, tmp_path, capfd):
    config = make_params(experiment)
    assert track.sync(config, results) == dict.fromkeys(track.rooms(config), True)
    assert capfd.readouterr() == ("", "")  # first use of the store, too, is quiet

    [chain], children = runs(experiment)
    assert set(children) == set(track.rooms(config))
    assert {run.info.run_name for run in children.values()} == set(children)
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {chain.info.run_id}

    assert chain.data.metrics == {"student.top1": 81.5, "speedup.images_per_s": 4.0}
    assert chain.data.params["distill.stages.all.lr"] == "0.0001"
    assert chain.data.params["features.views.crop_scale"] == "[0.2, 1.0]"
    assert chain.data.params["data.table"] == "null"
    assert not [name for name in chain.data.params if name.startswith("mlflow")]

    history = json.loads((results / "distill/all/history.json").read_text())
    for metric in ("loss", "pooled", "patch_tokens", "lr", "images_per_s"):
        expected = [(row["samples"], row[metric]) for row in history]
        assert points(children["distill/all"], metric) == expected
    assert set(children["distill/all"].data.metrics) == set(history[0]) - {"step", "samples"}
    assert children["distill/all"].data.params["train"] == "all"
    assert children["distill/mlp"].data.params["train"] == "mlp"

    prune = children["prune"]
    assert points(prune, "error_refit") == [(0, 0.1), (1, 1.1), (2, 2.1)]
    assert points(prune, "error_plain.mean") == [(0, 1.5)]
    assert points(prune, "kept") == [(i, 192) for i in range(BLOCKS)]
    assert prune.data.tags["dgmr.artefact"] == "p1"
    assert prune.data.params["ratio"] == "1.0"

    data = children["data"].data.metrics
    assert data["table.url not file"] == 20 and data["images.ok"] == 95 and 5 in data.values()
    assert children["features"].data.metrics["target_bytes"] == 1 << 40
    evaluation = children["evaluate"]
    assert evaluation.data.metrics["pruned.top1"] == 81.5
    assert evaluation.data.metrics["pruned.images_per_s"] == 200.0
    assert "renamed.top1" not in evaluation.data.metrics
    assert evaluation.data.params["speed.threads"] == "2"
    assert children["teacher"].data.params["provenance.sha256"] == "t1"

    assert chain.info.artifact_uri.startswith((workspace / "mlartifacts").as_uri())
    assert artifacts(children["report"]) == {"report.html": "<html>the report</html>"}
    (tmp_path / "params.yaml").write_text(artifacts(chain)["params.yaml"])
    as_logged = config.model_copy(update={"mlflow": params.Mlflow()})
    assert params.read(tmp_path / "params.yaml") == as_logged


def test_telling_again_changes_nothing(results, experiment):
    config = make_params(experiment)
    track.sync(config, results)
    chains, children = runs(experiment)
    assert all(track.track(room, config, results) for room in track.rooms(config))
    chains_again, children_again = runs(experiment)
    assert [run.to_dictionary() for run in chains_again] == [run.to_dictionary() for run in chains]
    assert {name: run.info.run_id for name, run in children_again.items()} == {
        name: run.info.run_id for name, run in children.items()
    }
    assert len(points(children_again["distill/mlp"], "loss")) == len(STEPS)
    assert len(points(chains_again[0], "student.top1")) == 1


class Killed(BaseException):
    """Not an Exception, as a signal is none: nothing may tidy up."""


@pytest.mark.parametrize(
    ("method", "call"),
    [("log_text", 1), ("log_batch", 2), ("log_artifact", 2), ("set_terminated", 3)],
    ids=["in the chain", "in the room", "before artifacts", "at the end"],
)
def test_what_a_killed_job_left_is_made_whole(results, experiment, monkeypatch, method, call):
    from mlflow import MlflowClient

    original, calls = getattr(MlflowClient, method), []

    def killed(*arguments, **keywords):
        calls.append(method)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **keywords)

    config = make_params(experiment)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MlflowClient, method, killed)
        track.track("report", config, results)
    with pytest.raises(AssertionError):
        runs(experiment)  # something is unfinished, or this test tests nothing

    assert track.track("report", config, results)
    [chain], children = runs(experiment)
    assert list(children) == ["report"]
    assert "report.html" in artifacts(children["report"]) and "params.yaml" in artifacts(chain)
    assert points(chain, "student.top1") == [(0, 81.5)]
    assert points(children["report"], "student.top1") == [(0, 81.5)]


def test_room_made_anew_replaces_its_run(results, experiment):
    config = make_params(experiment)
    track.sync(config, results)
    _, before = runs(experiment)
    write(results / "distill/mlp/provenance.json", {"sha256": "another"})
    write(results / "distill/mlp/history.json", [{"step": 1, "samples": 64, "loss": 1.0}])
    write(results / "metrics.json", {"student.top1": 90.0})
    track.sync(config, results)
    [chain], after = runs(experiment)
    renewed = {name for name in after if after[name].info.run_id != before[name].info.run_id}
    assert renewed == {"distill/mlp", "report"}
    assert after["distill/mlp"].data.tags["dgmr.artefact"] == "another"
    assert points(after["distill/mlp"], "loss") == [(64, 1.0)]
    assert chain.data.metrics["student.top1"] == 90.0


def test_other_params_are_another_chain(results, experiment):
    assert track.track("teacher", make_params(experiment), results)
    assert track.track("teacher", make_params(experiment, model="m" * 7000), results)
    assert len(search(experiment)) == 4


def test_two_jobs_at_once_leave_one_run(results, experiment):
    script = (
        "import sys, mlflow; from pathlib import Path; from dgmr import params, track\n"
        "config = params.section(params.Params, sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "sys.exit(not track.track('prune', config, Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", script, make_params(experiment).model_dump_json(), results]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(Path(track.__file__).parents[1])}
    jobs = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    for job in jobs:
        job.communicate(timeout=120)
    assert [job.returncode for job in jobs] == [0, 0]
    [chain], children = runs(experiment)
    assert list(children) == ["prune"]


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:secret@127.0.0.1:1",
        "postgresql://user:secret@127.0.0.1:1/db",
        "sqlite:////proc/nowhere/mlflow.db",
        "nonsense://user:secret@store",
    ],
    ids=["server", "database", "file", "nonsense"],
)
def test_store_out_of_reach_is_one_warning(results, experiment, uri, capfd):
    started = time.monotonic()
    config = make_params(experiment, uri)
    assert track.sync(config, results) == dict.fromkeys(track.rooms(config), False)
    assert time.monotonic() - started < 30
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("Warning: MLflow store") and err.count("\n") == 1
    assert "secret" not in err


@pytest.mark.slow  # MLflow waits 20 s for a lock
def test_store_locked_by_another_program_is_one_warning(results, experiment, capfd):
    assert track.track("teacher", make_params(experiment), results)
    with contextlib.closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not track.track("data", make_params(experiment), results)
    out, err = capfd.readouterr()
    assert out == "" and "database is locked" in err and err.count("\n") == 1


def test_endless_other_job_is_one_warning(results, experiment, monkeypatch, capfd):
    monkeypatch.setattr(track, "_LOCK_TIMEOUT_S", 0.1)
    track.LOCK.parent.mkdir(exist_ok=True)
    with FileLock(track.LOCK):
        assert not track.track("teacher", make_params(experiment), results)
    assert capfd.readouterr().err.startswith("Warning: MLflow store")
    assert track.track("teacher", make_params(experiment), results)


def test_no_store_is_no_warning(results, experiment, capfd):
    assert not track.track("teacher", make_params(experiment, None), results)
    assert capfd.readouterr() == ("", "")


def test_only_done_rooms_are_told(results, experiment):
    config = make_params(experiment)
    (results / "distill/all/history.json").unlink()
    (results / "evaluate/speed.json").unlink()
    assert set(track.sync(config, results)) == {*track.rooms(config)} - {"distill/all", "evaluate"}
    with pytest.raises(DgmrError, match="distill/all"):
        track.track("distill/all", config, results)
    with pytest.raises(DgmrError, match="distill/mlp"):  # what there is
        track.track("distill/none", config, results)
    write(results / "data/metrics.json", "{")
    with pytest.raises(json.JSONDecodeError):  # no fault of the store's
        track.track("data", config, results)
