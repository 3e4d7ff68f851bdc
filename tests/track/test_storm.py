"""Eight at once, killed at random: the store still comes to say what the files say, once."""

import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tellers
import told
from dgmr.track.accounts import flat, read
from dgmr.track.store import _as_params
from server import Server
from told import history, make_params, write

STAGES = ("distill/mlp", "distill/all")


class Chain:
    """A chain whose rooms are done one after the other, in a working folder."""

    def __init__(self, folder, whole, uri, experiment, seed):
        self.random = random.Random(seed)
        self.folder, self.whole, self.uri, self.experiment = folder, whole, uri, experiment
        self.results = folder / "results"
        self.config = make_params(experiment, uri)
        self.rooms = told.names(self.config)
        self.done, self.rows = [], {stage: history(speed=100.0) for stage in STAGES}
        self.killed = self.survived = self.in_the_midst = 0
        self.within_s, self.took = 6.0, []
        self.dirty = Counter()
        folder.mkdir(parents=True)

    def move_on(self):
        """Another room is done, or a stage has some more rows, or fewer again for it was killed."""
        room = next((room for room in self.rooms if room not in self.done), None)
        if room is None:
            return
        if room in STAGES and self.random.random() < 0.75:
            return self._train(room)
        self._finish(room)

    def _train(self, stage):
        rows = self.rows[stage]
        saved = self.random.randrange(len(rows))
        # Behind the checkpoint the same losses come again, at another speed.
        speed = self.random.uniform(50, 150)
        rows[saved:] = [row | {"images_per_s": speed + row["step"]} for row in rows[saved:]]
        upto = min(len(rows), saved + self.random.randrange(30))
        name = stage.partition("/")[2]
        about = {
            "output": str((self.results / stage).resolve()),
            "host": socket.gethostname(),
            "pid": self.random.choice([os.getpid(), 2**22 + 1]),  # no process has that one
            "steps": len(rows),
            "step": upto,
            "rows": rows[:upto],
        }
        run = self.folder / told.runs_of(name, self.config) / "run"
        shutil.rmtree(run, ignore_errors=True)
        write(run / "live.partial", about)
        (run / "live.partial").rename(run / "live.json")
        (run / f"step-{saved:08d}").mkdir()

    def _finish(self, room):
        names = {"evaluate": ["evaluate"], "report": ["metrics.json", "report.html", "student"]}
        if room in STAGES:
            told.finish(self.results, room.partition("/")[2], self.rows[room])
        for name in names.get(room, [] if room in STAGES else [room]):
            source, target = self.whole / name, self.results / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        self.done.append(room)

    def gust(self, count, naive=False):
        """So many tellers at once, most of which are killed while others of them would still tell."""
        given = ["--results", self.results, "--config", self.config.model_dump_json()]
        began, tellings, spared = time.monotonic(), [], []
        for _ in range(count):
            kind = self.random.choice(["room", "room", "sync", "follow"])
            what = [kind, self.random.choice(self.done)] if kind == "room" else [kind]
            what += ["--wait-s", 1] if kind == "follow" else []
            process = tellers.start(self.folder, *what, *given, naive=naive)
            is_spared = (
                kind != "follow" and self.random.random() < 0.15
            )  # to follow may have no end
            (spared if is_spared else tellings).append(process)
        for after in sorted(self.random.uniform(0, self.within_s) for _ in tellings):
            time.sleep(max(0, began + after - time.monotonic()))
            if alive := [process for process in tellings if process.is_alive()]:
                victim = self._telling(alive) or self.random.choice(alive)
                victim.kill()
                victim.join()
        for process in spared:
            process.join(120)
            self.took = [*self.took[-4:], time.monotonic() - began]
        for process in tellings + spared:
            process.kill()
            process.join()
            self.killed += process.exitcode == -9
            self.survived += process.exitcode == 0
            assert process.exitcode in (0, -9), (self.folder / "tellers.out").read_text()
        if self.took:  # as fast as the machine is now
            self.within_s = sum(self.took) / len(self.took)

    def _telling(self, processes):
        """The one that has the lock, and so is in the midst of it."""
        lock = self.folder / "work/track.lock"
        if not lock.exists():
            return None
        inode = f":{lock.stat().st_ino} "
        lines = [line for line in Path("/proc/locks").read_text().splitlines() if inode in line]
        holders = {int(line.split()[4]) for line in lines if "->" not in line}
        found = next((process for process in processes if process.pid in holders), None)
        self.in_the_midst += found is not None
        return found

    def look(self):
        """Note what the killed ones have left in the store."""
        if not self.folder.joinpath("mlflow.db").exists() and self.uri.startswith("sqlite"):
            return  # to look would make it
        store = told.Store(self.experiment, self.uri)
        if store.id is None:
            return
        runs, models = store.all(), store.models()
        self.dirty["unfinished"] += sum(run.info.status == "RUNNING" for run in runs)
        names = Counter(run.data.tags.get("dgmr.room") for run in runs)
        self.dirty["twice"] += sum(count - 1 for count in names.values())
        self.dirty["half a model"] += sum(str(model.status) == "PENDING" for model in models)

    def sync(self):
        """The one telling after the storm, by the real command."""
        given = ["--results", self.results, "--config", self.config.model_dump_json()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        teller = told.run("sync", *given, cwd=self.folder, **pipes)
        out, err = teller.communicate(timeout=300)
        assert teller.returncode == 0 and err == ""
        assert out.splitlines() == [f"{room}: told" for room in self.done]

    def check(self, monkeypatch):
        """One finished run of the chain and of every room, with the files' values, all of them once."""
        monkeypatch.chdir(self.folder)
        store = told.Store(self.experiment, self.uri)
        [chain], found = store.finished()
        assert set(found) == set(self.done)
        assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {
            chain.info.run_id
        }
        params = {p.key: p.value for p in _as_params(flat(self.config.shaping()))}
        assert chain.data.params == params
        assert set(store.artifacts(chain)) == {"params.yaml"}
        for room, run in found.items():
            account = read(told.room(room, self.config, self.results))
            told_points = [
                (point.key, point.value, point.step)
                for metric in run.data.metrics
                for point in store.client.get_metric_history(run.info.run_id, metric)
            ]
            assert sorted(told_points) == sorted(point[:3] for point in account.points)
            assert run.data.params == {p.key: p.value for p in _as_params(account.params)}
            assert run.data.tags["dgmr.artefact"] == account.artefact
        if "report" in found:
            assert set(store.artifacts(found["report"])) == {"report.html"}
            (model,) = store.models()
            assert str(model.status) == "READY"
            assert model.source_run_id == found["report"].info.run_id
        return chain, found


def storm(chain, rounds, count, naive=False, between=lambda _: None):
    chain._finish("teacher")
    for number in range(rounds):
        chain.gust(count, naive)
        chain.look()
        chain.move_on()
        between(number)
    while len(chain.done) < len(chain.rooms):
        chain._finish(next(room for room in chain.rooms if room not in chain.done))
        chain.gust(count, naive)
        chain.look()
    print(
        f"killed {chain.killed}, {chain.in_the_midst} of them as they told; not killed {chain.survived}, seen {dict(chain.dirty)}"
    )


@pytest.fixture
def fresh(tmp_path, whole, experiment):
    """A chain on a store that is not there yet."""

    def make(seed, name="place"):
        folder = tmp_path / name
        return Chain(folder, whole, f"sqlite:///{folder}/mlflow.db", experiment, seed)

    return make


def test_eight_at_once_on_a_fresh_store(fresh, monkeypatch):
    chain = fresh(0)
    for room in chain.rooms:
        chain._finish(room)
    given = ["--results", chain.results, "--config", chain.config.model_dump_json()]
    running = [tellers.start(chain.folder, "room", room, *given) for room in chain.rooms]
    for process in running:
        process.join(300)
    assert [process.exitcode for process in running] == [0] * 8
    assert "Warning" not in (chain.folder / "tellers.out").read_text()
    chain.check(monkeypatch)


def test_two_folders_at_once_make_one_store(tmp_path, whole, experiment):
    """Each has a lock of its own, and sees no store when it begins."""
    uri = f"sqlite:///{tmp_path}/shared/mlflow.db"
    chains = [Chain(tmp_path / name, whole, uri, f"{experiment}-{name}", 0) for name in "ab"]
    running = []
    for chain in chains:
        chain._finish("teacher")
        given = ["--results", chain.results, "--config", chain.config.model_dump_json()]
        running.append(tellers.start(chain.folder, "room", "teacher", *given))
    for process in running:
        process.join(300)
    assert [process.exitcode for process in running] == [0, 0]
    for chain in chains:
        assert "Warning" not in (chain.folder / "tellers.out").read_text()
        _, found = told.Store(chain.experiment, uri).finished()
        assert list(found) == ["teacher"]
    assert [path.name for path in (tmp_path / "shared").glob("mlflow.db*")] == ["mlflow.db"]


def test_gusts(fresh, monkeypatch):
    chain = fresh(1)
    storm(chain, rounds=1, count=3)
    chain.sync()
    chain.check(monkeypatch)
    assert chain.killed > 3


@pytest.mark.slow
def test_storm_on_fresh_stores(fresh, monkeypatch):
    """Killed as they make it, again and again."""
    in_the_making = 0
    for seed in range(6):
        chain = fresh(seed, f"place-{seed}")
        chain._finish("teacher")
        for _ in range(3):
            before = chain.in_the_midst
            chain.gust(8)
            if not (chain.folder / "mlflow.db").exists():
                in_the_making += chain.in_the_midst - before
        chain.sync()
        chain.check(monkeypatch)
    print(f"killed as they made the store: {in_the_making}")
    assert in_the_making, "no kill was early enough to prove anything"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_storm_on_sqlite(fresh, monkeypatch, seed):
    chain = fresh(seed)
    storm(chain, rounds=15, count=8)
    chain.sync()
    _, found = chain.check(monkeypatch)
    assert chain.in_the_midst > 20 and chain.dirty["unfinished"]
    _assert_nothing_orphaned(chain, found)


@pytest.mark.slow
def test_storm_on_a_server(tmp_path, whole, experiment, monkeypatch):
    """It is killed, too, and started again."""
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    try:
        chain = Chain(tmp_path / "place", whole, server.uri, experiment, 7)

        def between(number):
            if number % 5 == 4:
                chain.gust(3)
                server.kill()
                server.start()

        storm(chain, rounds=12, count=8, between=between)
        time.sleep(2)  # what was on its way has arrived
        chain.sync()
        chain.check(monkeypatch)
        assert chain.in_the_midst > 5
    finally:
        server.kill()


@pytest.mark.slow
def test_storm_breaks_a_naive_teller(fresh, monkeypatch):
    chain = fresh(3)
    storm(chain, rounds=6, count=8, naive=True)
    given = ["--results", chain.results, "--config", chain.config.model_dump_json()]
    tellers.start(chain.folder, "sync", *given, naive=True).join(120)
    with pytest.raises((AssertionError, ValueError)):
        chain.check(monkeypatch)


def _assert_nothing_orphaned(chain, found):
    """What lies there beside the runs and the model is MLflow's to collect, and is collected."""
    database = chain.folder / "mlflow.db"
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", chain.uri]
    environment = told.ENVIRONMENT | {"MLFLOW_TRACKING_URI": chain.uri}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=chain.folder)
    with sqlite3.connect(database) as connection:
        kept = {row[0] for row in connection.execute("select run_uuid from runs")}
        models = {row[0] for row in connection.execute("select model_id from logged_models")}
    assert len(kept) == 1 + len(found) and len(models) == 1
    lying = {path.name for path in (chain.folder / "mlartifacts").iterdir()} - {"models"}
    lying |= {path.name for path in (chain.folder / "mlartifacts/models").iterdir()}
    assert lying <= kept | models
