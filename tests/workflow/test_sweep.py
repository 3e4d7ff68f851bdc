"""A sweep through the rules: what its runs share is made once, and each is the run that it says it is."""

import json
from collections import Counter

import pytest
from dgmr.files import sha256

RATIOS = [0.5, 2.0]
ONCE = (
    "results/teacher",
    "results/data",
    "results/evaluation_data",
    "results/features",
    "work/data",
)
ONCE += ("work/features", "work/prune/*/orders", "results/prune", "results/distill", "work/distill")
# What a point runs; its teacher is scored already, and its orders are those of the run itself.
POINT = Counter(refit_blocks=2, assemble=1, distill_stage=1, evaluate_model=2, measure_speed=1)
POINT += Counter(gather=1, report_point=1)


def times(place):
    """When the files were written that a point has no part in."""
    found = {}
    for pattern in ONCE:
        for root in place.folder.glob(pattern):
            found |= {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    return found


def student(place, results="results"):
    return sha256(place / f"{results}/student/model.safetensors")


@pytest.fixture(scope="module")
def place(finished, tmp_path_factory):
    """The finished chain with its first stage alone, which is there already."""
    place = finished.copy(tmp_path_factory.mktemp("sweep") / "copy")
    stage = {"train": "mlp", "samples": 640, "batch_size": 64, "lr": 1e-3, "min_lr": 1e-5}
    place.edit(distill__stages={"mlp": stage}, mlflow__tracking_uri=None).finish()
    return place


@pytest.fixture(scope="module")
def swept(place):
    """The points run; what was there before, and what was planned."""
    before = times(place)
    assert len({path.suffix for path in before}) > 3
    place.edit(sweep={"prune.ratio": RATIOS})
    planned = place.planned()
    place.finish()
    return before, planned


def test_runs_share_all_before_the_pruning(place, swept):
    before, planned = swept
    assert planned == Counter({rule: 2 * n for rule, n in POINT.items()}) + Counter(
        check=1, report=1, all=1
    )
    after = times(place)
    assert {path: after.get(path) for path in before} == before
    assert not place.planned()


def test_page_and_rows_list_the_points(place, swept):
    rows = json.loads((place / "results/sweep.json").read_text())
    assert [row["point"] for row in rows] == ["ratio-0.5", None, "ratio-2.0"]  # by size
    assert [row["values"] for row in rows] == [{"prune.ratio": r} for r in (0.5, 1.0, 2.0)]
    page = (place / "results/report.html").read_text()
    for row in rows:
        folder = f"results/sweep/{row['point']}" if row["point"] else "results"
        assert row["metrics"] == json.loads((place / f"{folder}/metrics.json").read_text())
        assert (f'href="sweep/{row["point"]}/report.html"' in page) == bool(row["point"])
    assert "Sweep" not in (place / "results/sweep/ratio-0.5/report.html").read_text()


def test_a_point_is_the_run_that_has_its_values(place, swept, tmp_path):
    """And that run is served from what the point has made."""
    alone = place.copy(tmp_path / "copy")
    for path in sorted((alone / "work/distill").glob("*")):
        path.rename(path.with_name(f"{path.name}-away"))  # no checkpoint: it trains anew
    alone.edit(prune__ratio=0.5, sweep={})
    alone.finish("check", "distill")
    trained = sha256(alone / "results/distill/mlp/model.safetensors")
    assert trained == student(place, "results/sweep/ratio-0.5")
    assert trained != student(place) != student(place, "results/sweep/ratio-2.0")


def test_values_come_and_go(place, swept, tmp_path):
    copy = place.copy(tmp_path / "copy")
    more = Counter(check=1, report=1, all=1)
    copy.edit(sweep={"prune.ratio": [*RATIOS, 1.5]})
    assert copy.planned() == POINT + more
    copy.edit(sweep={"prune.ratio": [2.0]})
    assert copy.planned() == more
    copy.finish()
    assert [row["point"] for row in json.loads((copy / "results/sweep.json").read_text())] == [
        None,
        "ratio-2.0",
    ]
    assert "sweep/ratio-0.5/" not in (copy / "results/report.html").read_text()
