"""The MLflow store says what the files say: once, and whole."""

import contextlib
import json
import sqlite3
import time

import pytest
import told
from dgmr import params
from dgmr.errors import DgmrError
from dgmr.track import tell
from dgmr.track.tell import sync, track
from filelock import FileLock
from server import Late
from told import BLOCKS, STEPS, make_params, names, write


def test_store_says_what_the_files_say(results, experiment, store, workspace, tmp_path, capfd):
    config = make_params(experiment)
    assert sync(config, results) == dict.fromkeys(names(config), True)
    assert capfd.readouterr() == ("", "")  # first use of the store, too, is quiet

    [chain], children = store().finished()
    assert set(children) == set(names(config))
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
        assert store().points(children["distill/all"], metric) == expected
    assert set(children["distill/all"].data.metrics) == set(history[0]) - {"step", "samples"}
    assert children["distill/all"].data.params["train"] == "all"
    assert children["distill/mlp"].data.params["train"] == "mlp"

    prune = children["prune"]
    assert store().points(prune, "error_refit") == [(0, 0.1), (1, 1.1), (2, 2.1)]
    assert store().points(prune, "error_plain.mean") == [(0, 1.5)]
    assert store().points(prune, "kept") == [(i, 192) for i in range(BLOCKS)]
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
    assert store().artifacts(children["report"]) == {"report.html": "<html>the report</html>"}
    (tmp_path / "params.yaml").write_text(store().artifacts(chain)["params.yaml"])
    as_logged = config.model_copy(update={"mlflow": params.Mlflow()})
    assert params.read(tmp_path / "params.yaml") == as_logged


def test_telling_again_changes_nothing(results, experiment, store):
    config = make_params(experiment)
    sync(config, results)
    chains, children = store().finished()
    assert all(track(room, config, results) for room in names(config))
    chains_again, children_again = store().finished()
    assert [run.to_dictionary() for run in chains_again] == [run.to_dictionary() for run in chains]
    assert {name: run.info.run_id for name, run in children_again.items()} == {
        name: run.info.run_id for name, run in children.items()
    }
    assert len(store().points(children_again["distill/mlp"], "loss")) == len(STEPS)
    assert len(store().points(chains_again[0], "student.top1")) == 1


class Killed(BaseException):
    """Not an Exception, as a signal is none: nothing may tidy up."""


@pytest.mark.parametrize(
    ("method", "call"),
    [("log_text", 1), ("log_batch", 2), ("log_artifact", 2), ("set_terminated", 3)],
    ids=["in the chain", "in the room", "before artifacts", "at the end"],
)
def test_what_a_killed_job_left_is_made_whole(
    results, experiment, store, monkeypatch, method, call
):
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
        track("report", config, results)
    with pytest.raises(AssertionError):
        store().finished()  # something is unfinished, or this test tests nothing

    assert track("report", config, results)
    [chain], children = store().finished()
    assert list(children) == ["report"]
    assert "report.html" in store().artifacts(
        children["report"]
    ) and "params.yaml" in store().artifacts(chain)
    assert store().points(chain, "student.top1") == [(0, 81.5)]
    assert store().points(children["report"], "student.top1") == [(0, 81.5)]


def test_room_made_anew_replaces_its_run(results, experiment, store):
    config = make_params(experiment)
    sync(config, results)
    _, before = store().finished()
    write(results / "distill/mlp/provenance.json", {"sha256": "another"})
    write(results / "distill/mlp/history.json", [{"step": 1, "samples": 64, "loss": 1.0}])
    write(results / "metrics.json", {"student.top1": 90.0})
    sync(config, results)
    [chain], after = store().finished()
    renewed = {name for name in after if after[name].info.run_id != before[name].info.run_id}
    assert renewed == {"distill/mlp", "report"}
    assert after["distill/mlp"].data.tags["dgmr.artefact"] == "another"
    assert store().points(after["distill/mlp"], "loss") == [(64, 1.0)]
    assert chain.data.metrics["student.top1"] == 90.0


def test_other_params_are_another_chain(results, experiment, store):
    assert track("teacher", make_params(experiment), results)
    assert track("teacher", make_params(experiment, model="m" * 7000), results)
    assert len(store().all()) == 4


def test_two_jobs_at_once_leave_one_run(results, experiment, store):
    config = make_params(experiment).model_dump_json()
    tellers = [told.run("room", "prune", "--results", results, "--config", config) for _ in "ab"]
    assert [teller.wait(120) for teller in tellers] == [0, 0]
    [chain], children = store().finished()
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
def test_store_out_of_reach_is_one_warning(results, experiment, store, uri, capfd):
    started = time.monotonic()
    config = make_params(experiment, uri)
    assert sync(config, results) == dict.fromkeys(names(config), False)
    assert time.monotonic() - started < 30
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("Warning: MLflow store") and err.count("\n") == 1
    assert "secret" not in err


@pytest.mark.slow  # MLflow waits 20 s for a lock
def test_store_locked_by_another_program_is_one_warning(results, experiment, store, capfd):
    assert track("teacher", make_params(experiment), results)
    with contextlib.closing(sqlite3.connect("mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert not track("data", make_params(experiment), results)
    out, err = capfd.readouterr()
    assert out == "" and "database is locked" in err and err.count("\n") == 1


def test_endless_other_job_is_one_warning(results, experiment, store, monkeypatch, capfd):
    monkeypatch.setattr(tell, "LIMIT_S", 0.1)
    tell.LOCK.parent.mkdir(exist_ok=True)
    with FileLock(tell.LOCK):
        assert not track("teacher", make_params(experiment), results)
    assert capfd.readouterr().err.startswith("Warning: MLflow store")
    monkeypatch.undo()
    assert track("teacher", make_params(experiment), results)


def test_no_store_is_no_warning(results, experiment, store, capfd):
    assert not track("teacher", make_params(experiment, None), results)
    assert capfd.readouterr() == ("", "")


def test_only_done_rooms_are_told(results, experiment, store):
    config = make_params(experiment)
    (results / "distill/all/history.json").unlink()
    (results / "evaluate/speed.json").unlink()
    assert set(sync(config, results)) == {*names(config)} - {"distill/all", "evaluate"}
    with pytest.raises(DgmrError, match="distill/all"):
        track("distill/all", config, results)
    with pytest.raises(DgmrError, match="distill/mlp"):  # what there is
        track("distill/none", config, results)
    write(results / "data/metrics.json", "{")
    with pytest.raises(json.JSONDecodeError):  # no fault of the store's
        track("data", config, results)


def test_rooms_of_other_params_are_not_told(results, experiment, store):
    """A finished chain, then another rate for its second stage: what is behind it is not done."""
    config = make_params(experiment)
    stages = {name: stage.model_dump() for name, stage in config.distill.stages.items()}
    edited = make_params(experiment, stages=stages | {"all": stages["all"] | {"lr": 5e-4}})
    assert set(sync(config, results)) == {*names(config)}
    assert set(sync(edited, results)) == {*names(config)} - {"distill/all", "evaluate", "report"}
    assert set(sync(config, results)) == {*names(config)}  # a knob turned back
    assert track("evaluate", edited, results)  # by hand, without Snakemake, who knows


def test_late_store_is_one_warning_in_time_and_caught_up(
    results, experiment, server, monkeypatch, capfd
):
    late = Late(server.port, delay_s=1.0)
    given_up = make_params(experiment, late.uri)
    monkeypatch.setattr(tell, "LIMIT_S", 4.0)
    for room in ("prune", "distill/mlp", "report"):
        began = time.monotonic()
        assert not track(room, given_up, results)
        assert time.monotonic() - began < 4 + 6  # and what the student's size allows
        out, err = capfd.readouterr()
        assert out == "" and "no end after 4 s" in err and err.count("\n") == 1
    assert late.requests > 3
    monkeypatch.undo()
    time.sleep(1.5)  # what was sent arrives after its sender gave up
    assert all(sync(make_params(experiment, server.uri), results).values())
    found = told.Store(experiment, server.uri)
    [chain], children = found.finished()
    assert len(found.models()) == 1
    assert len(found.points(children["distill/mlp"], "loss")) == len(STEPS)
    late.delay_s = 0.01
    assert track("prune", given_up, results)
    late.shutdown()
