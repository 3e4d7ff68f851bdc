"""The points of a sweep are told with the run, each as a chain of its own."""

import os
import shutil
import socket

import pytest
import told
from dgmr import cli
from dgmr.track import follow as following
from dgmr.track.follow import follow
from dgmr.track.tell import sync, track
from told import history, make_params
from typer.testing import CliRunner

SWEEP = {"prune.ratio": [1.0, 0.5]}  # the run's own value, and another
OWN = ("prune", "distill/mlp", "distill/all", "evaluate", "report")
POINTS = ("ratio-1.0", "ratio-0.5")


@pytest.fixture
def config(experiment):
    return make_params(experiment, sweep=SWEEP)


@pytest.fixture
def swept(results, config):
    """The results, with those of the points in them."""
    told.stamp(results, "report", config)  # its page is about the points
    for name, params in config.points().items():
        point = told.make_results(results / "sweep" / name, params)
        for shared in ("teacher", "data", "features"):
            shutil.rmtree(point / shared)
        told.write(point / "metrics.json", {"student.top1": {"ratio-0.5": 60.0}.get(name, 81.5)})
    return results


def test_sync_tells_the_points(swept, config, store):
    expected = told.names(make_params("any"))
    expected += [f"sweep/{point}/{room}" for point in POINTS for room in OWN]
    assert sync(config, swept) == dict.fromkeys(expected, True)
    for point in POINTS:
        [chain], rooms = store().finished(point)
        assert set(rooms) == set(OWN)
        assert chain.data.params["prune.ratio"] == point.removeprefix("ratio-")
    chains = [run for run in store().all() if "mlflow.parentRunId" not in run.data.tags]
    assert sorted(run.data.metrics["student.top1"] for run in chains) == [60.0, 81.5, 81.5]
    assert len(store().models()) == 3


def tell_report(config, results, point):
    """As Snakemake does, which gives it the point's folder and params."""
    params = config.points()[point] if point else config
    folder = results / "sweep" / point if point else results
    given = ["--results", folder, "--config", params.model_dump_json(), "--point", point]
    done = CliRunner().invoke(cli.app, list(map(str, ["track", "room", "report", *given])))
    assert (done.exit_code, done.output) == (0, "report: told\n")


def test_point_of_the_same_params_is_another_chain(swept, config, store):
    """The run and one of its points differ in nothing but the page."""
    track("prune", make_params(config.mlflow.experiment), swept)  # before there was a sweep
    [before], _ = store().finished()
    for point in ("", *POINTS):
        tell_report(config, swept, point)
    runs = {run.info.run_id: run.data.tags["dgmr.params_key"] for run in store().all()}
    models = {model.model_id for model in store().models()}
    assert (len(runs), len(set(runs.values())), len(models)) == (7, 2, 3)
    [chain], _ = store().finished()
    assert chain.info.run_id == before.info.run_id and "dgmr.point" not in chain.data.tags
    for point in (*POINTS, ""):
        tell_report(config, swept, point)
        assert store().finished(point)[1].keys() >= {"report"}
    assert {run.info.run_id for run in store().all()} == runs.keys()
    assert {model.model_id for model in store().models()} == models


def test_only_done_points_are_told(swept, config):
    (swept / "sweep/ratio-1.0/prune/provenance.json").unlink()
    for stamp in (swept / "sweep/ratio-0.5/student").glob("*.stamp"):
        stamp.unlink()
    known = sync(config, swept)
    assert "sweep/ratio-1.0/prune" not in known and "sweep/ratio-1.0/report" in known
    assert "sweep/ratio-0.5/prune" in known and "sweep/ratio-0.5/report" not in known
    assert not sync(config, swept / "sweep/ratio-0.5")  # no run with these params


def test_store_out_of_reach_is_one_warning(swept, config, capfd):
    mlflow = config.mlflow.model_copy(update={"tracking_uri": "sqlite:////proc/no/mlflow.db"})
    known = sync(config.model_copy(update={"mlflow": mlflow}), swept)
    assert len(known) == 8 + 2 * len(OWN) and not any(known.values())
    err = capfd.readouterr().err
    assert err.count("Warning") == 1 and "sweep/ratio-0.5/prune" in err


def test_follow_follows_the_points(swept, config, store, monkeypatch, capfd):
    """As Snakemake trains them: the point of the run's own values has its stages as they are."""
    point, params = swept / "sweep/ratio-0.5", config.points()["ratio-0.5"]
    for stamp in point.glob("distill/mlp/*.stamp"):
        stamp.unlink()
    live = {"output": str(point / "distill/mlp"), "host": socket.gethostname(), "pid": os.getpid()}
    live |= {"steps": 250, "step": 10, "rows": history()[:10]}
    file = told.runs_of("mlp", params) / "run" / "live.json"
    scenes = iter([lambda: told.stamp(point, "distill/mlp", params)])
    told.write(file, live)
    monkeypatch.setattr(following.time, "sleep", lambda _: next(scenes)())
    follow(config, swept)
    lines = capfd.readouterr().out.splitlines()
    stage = "sweep/ratio-0.5/distill/mlp"
    assert [line for line in lines if line.startswith(stage)] == [
        f"{stage}: running",
        f"{stage}: finished",
    ]
    assert len(lines) == len(set(lines)) == 2 * 3 + 1
    for name in ("", *POINTS):
        assert {"distill/mlp", "distill/all"} == store().finished(name)[1].keys()
