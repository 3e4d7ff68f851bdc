"""What Snakemake, DVC and the environment say of the rooms goes with their runs."""

import inspect
import re

import pytest
import told
from dgmr.keys import Keys
from dgmr.track import accounts
from dgmr.track.accounts import read
from dgmr.track.tell import track
from told import make_params

STAGE = {"train": "mlp", "samples": 16000, "lr": 1e-3}
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


def system(room, config, results):
    points = read(told.room(room, config, results)).points
    found = {p.metric: p.value for p in points if p.metric.startswith("system/")}
    assert len([p for p in points if p.metric.startswith("system/")]) == len(found)
    return {name.removeprefix("system/"): value for name, value in found.items()}


def test_benchmarks_of_a_room_are_one_row(results, experiment, benchmark):
    keys = Keys(make_params(experiment))
    benchmark(
        "targets/0123456789ab/00000", [99.0, "", 9999, 0, 0, 0, 0, 0, 99.0, 99.0]
    )  # other params
    benchmark(f"targets/{keys.targets}/00000", [10.0, "0:00:10", 500, 0, 0, 400, 1, 2, 150.0, 15.0])
    benchmark(f"targets/{keys.targets}/00001", [30.0, "0:00:30", 700, 0, 0, 300, 1, 2, 190.0, 57.0])
    name = f"calibration/{keys.calibration}/calibration"
    benchmark(name, [0.1, "0:00:00", "-", "-", "-", "-", "NA", "NA", "NA", "NA"])
    found = system("features", make_params(experiment), results)
    assert found.pop("s") == pytest.approx(40.1)
    expected = {"max_rss": 700, "max_pss": 400, "io_in": 2, "io_out": 4, "cpu_time": 72}
    assert found == expected | {"mean_load": 180.0}
    assert system("data", make_params(experiment), results) == {}


def test_stages_have_benchmarks_of_their_own(results, experiment, store, benchmark):
    stages = {"mlp": STAGE, "all": STAGE | {"train": "all", "prune": {"ratio": 0.5}}}
    config = make_params(experiment, stages=stages)
    keys = Keys(config)
    for name in ("mlp", "all"):
        at = f"distill_stage/{keys.distill(name)}"
        benchmark(f"{at}/elsewhere/{name}", [999.0, "", 9999, 0, 0, 0, 0, 0, 99.0, 99.0])
    benchmark(
        f"distill_stage/{keys.distill('mlp')}/{results}/mlp",
        [60.0, "", 100, 0, 0, 0, 0, 0, 99.0, 59.0],
    )
    name = f"distill_stage/{keys.distill('all')}/{results}/all"
    benchmark(name, [90.0, "", 200, 0, 0, 0, 0, 0, 99.0, 89.0])
    name = f"prune_again/{keys.prune_again('all')}/{results}/all"
    benchmark(name, [10.0, "", 300, 0, 0, 0, 0, 0, 99.0, 9.0])
    assert system("distill/mlp", config, results)["s"] == 60.0
    found = system("distill/all", config, results)
    assert (found["s"], found["max_rss"]) == (100.0, 300.0)
    track("distill/all", config, results)
    assert store().points(store().rooms()["distill/all"], "system/max_rss") == [(0, 300.0)]


def test_every_measured_rule_has_a_room():
    rules = (told.REPOSITORY / "workflow/rules").glob("*.smk")
    text = "".join(path.read_text() for path in rules)
    measured = set(re.findall(r"work/benchmark/(\w+)/", text))
    assert len(measured) == text.count("    benchmark:\n") > 5
    assert measured == set(re.findall(r'f"(\w+)/\{keys', inspect.getsource(accounts._benchmarks)))
