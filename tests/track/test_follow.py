"""A stage that trains is told as it trains, and one run stays one run whatever dies."""

import os
import shutil
import socket
import subprocess
import time

import pytest
import told
from dgmr.errors import DgmrError
from dgmr.track import accounts
from dgmr.track import follow as following
from dgmr.track.follow import follow
from dgmr.track.tell import sync, track
from told import STEPS, history, make_params, write

ROOM = "distill/mlp"


def with_stage(experiment, **changes):
    """Params whose first stage has other values."""
    stages = {k: s.model_dump() for k, s in make_params(experiment).distill.stages.items()}
    return make_params(experiment, stages=stages | {"mlp": stages["mlp"] | changes})


@pytest.fixture
def nobody():
    """The id of a process that has ended."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


@pytest.fixture
def training(results, experiment):
    """Writes what the stage mlp has so far; nothing behind it is there yet."""
    shutil.rmtree(results / "distill")
    shutil.rmtree(results / "evaluate")
    (results / "metrics.json").unlink()
    shutil.rmtree("work/distill", ignore_errors=True)

    def write_live(rows, run="run", saved=0, age_s=0.0, config=None, **changes):
        about = {
            "output": str(results / ROOM),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "steps": len(STEPS),
            "step": rows[-1]["step"] if rows else 1,
            "rows": rows,
        }
        place = told.runs_of("mlp", config or make_params(experiment))
        file = place / run / "live.json"
        write(file, about | changes)
        if saved:
            (file.parent / f"step-{saved:08d}").mkdir(exist_ok=True)
        os.utime(file, (time.time() - age_s,) * 2)

    return write_live


def values(rows, name):
    return [(row["samples"], row[name]) for row in rows]


def assert_says(store, run, rows, timed):
    for name in ("loss", "pooled", "patch_tokens", "lr"):
        assert store.points(run, name) == values(rows, name)
    assert store.points(run, "images_per_s") == values(rows[:timed], "images_per_s")


def test_one_run_from_the_first_row_to_the_last(results, experiment, store, training, nobody):
    config, rows = make_params(experiment), history()
    training(rows[:10])
    sync(config, results)
    first = store().rooms()[ROOM]
    assert first.info.status == "RUNNING" and first.info.end_time is None
    assert_says(store(), first, rows[:10], 0)

    training(rows[:20], saved=15)
    for _ in range(2):
        sync(config, results)
    assert_says(store(), store().rooms()[ROOM], rows[:20], 15)
    assert store().rooms()[ROOM].data.tags["mlflow.note.content"] == "step 20 of 250"

    training(rows[:20], saved=15, pid=nobody)
    sync(config, results)
    assert store().rooms()[ROOM].info.status == "KILLED"

    # Resumed from its checkpoint: the same losses, at another speed.
    rows = rows[:15] + history(speed=50.0)[15:]
    training(rows[:17], saved=15)  # less than was told
    sync(config, results)
    assert_says(store(), store().rooms()[ROOM], history()[:20], 15)
    training(rows[:30], saved=25)
    sync(config, results)
    resumed = store().rooms()[ROOM]
    assert resumed.info.status == "RUNNING"
    assert_says(store(), resumed, rows[:30], 25)

    told.finish(results, "mlp", rows)
    assert track(ROOM, config, results)
    done = store().rooms()[ROOM]
    assert {run.info.run_id for run in (first, resumed, done)} == {first.info.run_id}
    assert done.info.status == "FINISHED" and done.data.tags["dgmr.artefact"] == "d-mlp"
    assert_says(store(), done, rows, len(rows))
    assert done.data.tags["mlflow.note.content"] == "step 250 of 250"
    sync(config, results)
    store().finished()
    assert len(store().points(store().rooms()[ROOM], "loss")) == len(rows)


def test_values_that_do_not_come_again_make_the_run_anew(results, experiment, store, training):
    config, rows = make_params(experiment), history()
    training(rows[:20])
    sync(config, results)
    training([row | {"loss": row["loss"] + 1e-12} for row in rows[:20]])
    sync(config, results)
    assert store().points(store().rooms()[ROOM], "loss") != values(rows[:20], "loss")
    told.finish(results, "mlp", rows)
    track(ROOM, config, results)
    _, rooms = store().finished()
    assert_says(store(), rooms[ROOM], rows, len(rows))


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "RUNNING"),
        ({"pid": None}, "KILLED"),
        ({"host": "elsewhere", "pid": None}, "RUNNING"),
        ({"host": "elsewhere", "age_s": 2 * accounts.STALE_S}, "KILLED"),
        ({"age_s": 2 * accounts.STALE_S}, "KILLED"),  # the id is another process's by now
    ],
    ids=["here", "gone", "elsewhere", "elsewhere, silent", "here, silent"],
)
def test_who_trains(results, experiment, training, nobody, changes, status):
    training(history()[:5], **{k: nobody if v is None else v for k, v in changes.items()})
    account = accounts.read_live(told.room(ROOM, make_params(experiment), results))
    assert account.status == status
    assert account.tags["dgmr.host"] == changes.get("host", socket.gethostname())


@pytest.mark.parametrize(
    "changes",
    [{"output": "/elsewhere/distill/mlp"}, {"config": with_stage("any", lr=1.0)}],
    ids=["results", "params"],
)
def test_runs_of_others_are_not_ours(results, experiment, training, changes):
    room = told.room(ROOM, make_params(experiment), results)
    training(history()[:9], run="other", age_s=-5.0, **changes)
    assert accounts.read_live(room) is None
    training(history()[:5])
    assert len(accounts.read_live(room).points) == 4 * 5


def test_what_was_finished_outlives_its_files(results, experiment, store, training, nobody):
    config = make_params(experiment)
    told.finish(results, "mlp")
    sync(config, results)
    before = store().rooms()[ROOM].info.run_id
    shutil.rmtree(results / ROOM)
    training(history()[:20], pid=nobody)
    sync(config, results)
    assert store().rooms()[ROOM].info.run_id == before
    training(history()[:20])  # trained anew: now there are two, until it is done
    sync(config, results)
    runs = [run for run in store().all() if run.data.tags.get("dgmr.room") == ROOM]
    assert sorted(run.info.status for run in runs) == ["FINISHED", "RUNNING"]
    told.finish(results, "mlp")
    sync(config, results)
    assert store().rooms()[ROOM].info.run_id == before


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(following, "_POLL_S", 0.01)


def test_follow_ends_with_the_stages(results, experiment, store, training, fast, nobody, capfd):
    config, rows = make_params(experiment), history()
    scenes = [
        lambda: training(rows[:10], saved=10),
        lambda: training(rows[:20], saved=10, pid=nobody),
        lambda: None,  # it is killed if it still is at the next look
        lambda: training(rows[:15], saved=10),
        lambda: training(rows, saved=10, pid=nobody),  # its stamp is about to come
        lambda: told.finish(results, "mlp"),
        lambda: track(ROOM, config, results),
        lambda: told.finish(results, "all"),
    ]
    scene = iter(scenes)

    def next_scene(_):
        next(scene)()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following.time, "sleep", next_scene)
        follow(config, results)
    assert next(scene, None) is None
    out, err = capfd.readouterr()
    expected = ["mlp: running", "mlp: killed", "mlp: running", "mlp: finished", "all: finished"]
    assert out.splitlines() == [f"distill/{line}" for line in expected] and err == ""
    _, rooms = store().finished()
    assert rooms.keys() == {ROOM, "distill/all"}
    assert_says(store(), rooms[ROOM], rows, len(rows))


def test_follow_waits_for_stages_of_these_params(results, experiment, store, training, fast, capfd):
    """The chain is done with another rate."""
    for stage in ("mlp", "all"):
        told.finish(results, stage)
    config, rows = with_stage(experiment, lr=5e-4), history(speed=70.0)
    scenes = [
        lambda: training(rows[:10], config=config),
        lambda: told.finish(results, "mlp", rows, config),
        lambda: told.finish(results, "all", rows, config),
    ]
    scene = iter(scenes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following.time, "sleep", lambda _: next(scene)())
        follow(config, results)
    assert next(scene, None) is None
    expected = ["mlp: running", "mlp: finished", "all: finished"]
    assert capfd.readouterr().out.splitlines() == [f"distill/{line}" for line in expected]
    _, rooms = store().finished()
    assert_says(store(), rooms[ROOM], rows, len(rows))


def test_follow_waits_only_so_long(results, experiment, training, nobody, fast):
    training(history()[:5], pid=nobody)
    began = time.monotonic()
    follow(make_params(experiment), results, wait_s=0.5)
    assert 0.5 < time.monotonic() - began < 30


def test_follow_warns_once_and_tells_later(results, experiment, store, training, fast, capfd):
    training(history()[:5])
    good, bad = make_params(experiment), make_params(experiment, "sqlite:////proc/no/mlflow.db")
    calls = []

    def after(_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(following.time, "sleep", after)
        follow(bad, results)
    assert capfd.readouterr().err.count("Warning") == 1
    sync(good, results)
    assert store().rooms()[ROOM].info.status == "RUNNING"


def test_nothing_to_follow_without_a_store(results, experiment):
    with pytest.raises(DgmrError, match="tracking_uri is null"):
        follow(make_params(experiment, None), results)
