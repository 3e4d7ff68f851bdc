"""The points of a sweep are told with the run, each as a chain of its own."""

import shutil

import pytest
import told
from dgmr import cli
from dgmr.track.tell import track
from told import make_params
from typer.testing import CliRunner

SWEEP = {"prune.ratio": [1.0, 0.5]}  # the run's own value, and another
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
