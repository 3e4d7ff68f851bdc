"""What Snakemake, DVC and the environment say of the rooms goes with their runs."""

import platform
import shutil
import socket
import subprocess
from importlib import metadata

import dgmr
import pytest
import told
import yaml
from dgmr.track import accounts
from dgmr.track.accounts import read
from dgmr.track.tell import sync
from told import make_params

HEADER = ["s", "h:m:s", "max_rss", "max_vms", "max_uss", "max_pss"]
HEADER += ["io_in", "io_out", "mean_load", "cpu_time"]


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Writes a table as Snakemake does, for a job of a rule."""
    monkeypatch.setattr(accounts, "BENCHMARKS", tmp_path / "benchmark")

    def write(job, *rows):
        lines = ["\t".join(HEADER), *("\t".join(map(str, row)) for row in rows)]
        told.write(tmp_path / "benchmark" / f"{job}.tsv", "\n".join(lines) + "\n")

    return write


def system(room, experiment, results):
    points = read(room, make_params(experiment), results).points
    found = {p.metric: p.value for p in points if p.metric.startswith("system/")}
    assert len([p for p in points if p.metric.startswith("system/")]) == len(found)
    return {name.removeprefix("system/"): value for name, value in found.items()}


def test_benchmarks_of_a_room_are_one_row(results, experiment, benchmark):
    benchmark("targets/00000", [10.0, "0:00:10", 500, 0, 0, 400, 1, 2, 150.0, 15.0])
    benchmark("targets/00001", [30.0, "0:00:30", 700, 0, 0, 300, 1, 2, 190.0, 57.0])
    benchmark("calibration", [0.1, "0:00:00", "-", "-", "-", "-", "NA", "NA", "NA", "NA"])
    found = system("features", experiment, results)
    assert found.pop("s") == pytest.approx(40.1)
    expected = {"max_rss": 700, "max_pss": 400, "io_in": 2, "io_out": 4, "cpu_time": 72}
    assert found == expected | {"mean_load": 180.0}
    assert system("data", experiment, results) == {}


def test_stages_have_benchmarks_of_their_own(results, experiment, store, benchmark):
    benchmark("distill_stage/mlp", [60.0, "", 100, 0, 0, 0, 0, 0, 99.0, 59.0])
    benchmark("distill_stage/all", [90.0, "", 200, 0, 0, 0, 0, 0, 99.0, 89.0])
    benchmark("prune_again/all", [10.0, "", 300, 0, 0, 0, 0, 0, 99.0, 9.0])
    assert system("distill/mlp", experiment, results)["s"] == 60.0
    found = system("distill/all", experiment, results)
    assert (found["s"], found["max_rss"]) == (100.0, 300.0)
    sync(make_params(experiment), results)
    assert store().points(store().rooms()["distill/all"], "system/max_rss") == [(0, 300.0)]


def test_every_rule_has_a_room():
    """Of those that do more than gather what others made."""
    rules = (told.REPOSITORY / "workflow/rules").glob("*.smk")
    named = {
        line.split()[1].rstrip(":")
        for path in rules
        for line in path.read_text().splitlines()
        if line.startswith("rule ")
    }
    gathering = {"check", "data", "evaluation_data", "features", "distill", "evaluate"}
    known = {rule for room in accounts._RULES.values() for rule in room}
    assert known == named - gathering - {"track", "train_demo_teacher"}


@pytest.fixture
def repository(tmp_path, whole, monkeypatch):
    """A DVC repository whose rooms DVC has versioned; gives its results."""
    folder = tmp_path / "repository"
    results = shutil.copytree(whole, folder / "results")
    monkeypatch.chdir(folder)
    stages = {
        "distill": {"cmd": "true", "outs": [{"results/distill": {"persist": True}}]},
        "report": {"cmd": "true", "metrics": [{"results/metrics.json": {"persist": True}}]},
    }
    told.write(folder / "dvc.yaml", yaml.safe_dump({"stages": stages}))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "commit", "-q", "-f"]):
        told.in_environment(command, check=True, capture_output=True)
    return results


def test_runs_carry_the_hashes_that_dvc_has(repository, experiment, store, uri):
    config = make_params(experiment, uri)
    locked = yaml.safe_load(accounts.DVC_LOCK.read_text())["stages"]
    distill, report = (locked[name]["outs"][0]["md5"] for name in ("distill", "report"))
    assert distill.endswith(".dir")
    sync(config, repository)
    _, rooms = store().finished()
    for stage in ("mlp", "all"):
        assert rooms[f"distill/{stage}"].data.tags["dgmr.dvc.results/distill"] == distill
    assert rooms["report"].data.tags["dgmr.dvc.results/metrics.json"] == report
    assert not [tag for tag in rooms["teacher"].data.tags if tag.startswith("dgmr.dvc")]


def test_hash_of_other_files_is_none_and_one_that_comes_later_is_told(
    repository, experiment, store, uri
):
    config = make_params(experiment, uri)
    name = "dgmr.dvc.results/distill"
    lock = accounts.DVC_LOCK.read_text()
    told.write(repository / "distill/all/more.json", {})
    sync(config, repository)
    assert name not in store().rooms()["distill/all"].data.tags
    told.in_environment(["dvc", "commit", "-q", "-f"], check=True, capture_output=True)
    assert accounts.DVC_LOCK.read_text() != lock
    sync(config, repository)
    assert name in store().rooms()["distill/all"].data.tags


def test_runs_say_what_made_them(results, experiment, store):
    config = make_params(experiment)
    sync(config, results)
    [chain], rooms = store().finished()
    expected = {name: metadata.version(name) for name in ("torch", "timm")}
    expected |= {"python": platform.python_version(), "version": dgmr.__version__}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=told.REPOSITORY, capture_output=True, text=True
    ).stdout.strip()
    (key,) = {run.data.tags["dgmr.params_key"] for run in (chain, *rooms.values())}
    assert chain.info.run_name == f"chain {key}"
    for run in (chain, *rooms.values()):
        tags = run.data.tags
        assert {name: tags[f"dgmr.{name}"] for name in expected} == expected
        assert tags["mlflow.source.git.commit"] == commit
        assert tags["dgmr.git_dirty"] in ("true", "false")
        assert tags["dgmr.told_on"] == socket.gethostname()
