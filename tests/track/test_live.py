"""The trainer writes a file and waits for nobody."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import tiny  # noqa: F401
import told
from dgmr import artefact
from dgmr.distill import live as living
from dgmr.distill.history import History
from dgmr.distill.live import Live
from dgmr.distill.trainer import train
from dgmr.files import read_json
from dgmr.params import Running
from dgmr.prune import prune_model
from dgmr.track.accounts import read, read_live
from server import Late
from tiny import data, features, teacher  # noqa: F401 - fixtures

STEPS = 40
# Ends with an error where the trainer would speak to anybody, or load what could.
ALONE = """
import os, sys, threading
def seen(event, arguments):
    if event == "import" and arguments[0].partition(".")[0] in ("mlflow", "requests"):
        os._exit(97)
    if event == "socket.connect":
        os._exit(98)
sys.addaudithook(seen)
from dgmr.__main__ import main
main()
"""


@pytest.fixture
def place(tmp_path, teacher, data, features, monkeypatch):  # noqa: F811
    """A chain as far as its stages, in the working folder."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results"
    for name, source in {"teacher": teacher, "data": data, "features": features}.items():
        results.mkdir(exist_ok=True)
        (results / name).symlink_to(source)
    artefact.save(results / "prune", prune_model(artefact.load(teacher), 0.5), {"stage": "prune"})
    return results


def config_of(experiment, uri):
    stage = {"train": "all", "samples": 4 * STEPS, "batch_size": 4, "lr": 1e-3}
    return told.make_params(experiment, uri, stages={"mlp": stage})


def arguments(results, config):
    rooms = {name: results / name for name in ("teacher", "data", "features")}
    stage = config.distill.stages["mlp"].model_dump_json(exclude={"prune"})
    given = {"stage": "mlp", "parent": results / "prune", "config": stage, "workers": 0, **rooms}
    given |= {"output": results / "distill/mlp", "runs": told.runs_of("mlp", config)}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_file_says_what_the_stage_has_so_far(place, experiment, monkeypatch):
    config = config_of(experiment, None)
    stage = config.distill.stages["mlp"]
    monkeypatch.setattr(living, "_EVERY_S", 0.0)
    monkeypatch.setattr(living, "_PART", 1e9)
    seen = []
    room = told.room("distill/mlp", config, place.relative_to(os.getcwd()))

    def write(path, value):
        living_write(path, value)
        seen.append((read_json(path), read_live(room)))

    living_write = living.write_json
    monkeypatch.setattr(living, "write_json", write)
    rooms = [place / name for name in ("prune", "teacher", "data", "features")]
    runs, running = told.runs_of("mlp", config), Running(workers=0)
    train("mlp", *rooms, stage, place / "distill/mlp", runs, running)
    history = read_json(place / "distill/mlp/history.json")
    assert [live["step"] for live, _ in seen] == list(range(1, STEPS + 1))
    for live, account in seen:
        assert live["rows"] == [row for row in history if row["step"] <= live["step"]]
        assert (live["host"], live["pid"]) == (socket.gethostname(), os.getpid())
        assert live["steps"] == STEPS
        assert account.status == "RUNNING"
        # Nothing of the run's checkpoint is there until its end.
        assert {p.metric for p in account.points} >= {"loss", "pooled", "lr"}
    done = read(told.room("distill/mlp", config, place))
    assert set(seen[-1][1].points) <= set(done.points)
    assert done.tags["dgmr.host"] == socket.gethostname()


def make_live(tmp_path):
    return Live(tmp_path, 10, tmp_path / "out")


def test_slow_disk_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(living.time, "monotonic", lambda: clock[0])

    def write(*_):
        written.append(clock[0])
        clock[0] += 1.0

    written = []
    monkeypatch.setattr(living, "write_json", write)
    live = make_live(tmp_path)
    while clock[0] < 10_000:
        live.write_if_due(1, History(10))
        clock[0] += 0.1
    assert 10 < len(written) < 0.01 * 10_000


def test_full_disk_fails_no_stage(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(living, "write_json", full)
    make_live(tmp_path).write_if_due(1, History(10))


@pytest.fixture
def silent():
    """A store that takes every request and never answers."""
    found = Late(9, delay_s=3600)
    yield found
    found.shutdown()


def test_trainer_never_waits_for_a_store(place, experiment, silent):
    """It trains beside `follow` with a store that never answers, speaks to nobody and ends."""
    config = config_of(experiment, silent.uri)
    given = ["--results", place, "--config", config.model_dump_json()]
    follower = told.run("follow", *given, stderr=subprocess.PIPE, text=True)
    try:
        trainer = [sys.executable, "-c", ALONE, "distill", "train", *arguments(place, config)]
        done = subprocess.run(trainer, env=told.ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        until = time.monotonic() + 60
        while not silent.requests and time.monotonic() < until:
            time.sleep(0.1)
        assert silent.requests and follower.poll() is None  # it is the one that waits
    finally:
        follower.kill()
        follower.communicate()
    assert len(read_json(place / "distill/mlp/history.json")) == STEPS


def test_alone_would_notice():
    for code, line in (
        (97, "import mlflow"),
        (98, "import socket; socket.socket().connect(('127.0.0.1', 9))"),
    ):
        script = ALONE.partition("from dgmr")[0] + line
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == code


def test_stage_is_followed_to_its_end(place, experiment, store, uri):
    """The real commands, side by side."""
    config = config_of(experiment, uri)
    given = ["--results", place, "--config", config.model_dump_json()]
    follower = told.run("follow", *given, stdout=subprocess.PIPE, text=True)
    trainer = [sys.executable, "-m", "dgmr", "distill", "train", *arguments(place, config)]
    subprocess.run(trainer, env=told.ENVIRONMENT, check=True, capture_output=True)
    told.stamp(place, "distill/mlp", config)
    out, _ = follower.communicate(timeout=120)
    assert follower.returncode == 0 and out.splitlines()[-1] == "distill/mlp: finished"
    _, rooms = store().finished()
    history = json.loads((place / "distill/mlp/history.json").read_text())
    for name in ("loss", "pooled", "images_per_s"):
        assert store().points(rooms["distill/mlp"], name) == [
            (row["samples"], row[name]) for row in history
        ]
