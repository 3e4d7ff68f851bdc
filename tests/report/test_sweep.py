"""A sweep in the report: the front, the page's section, the rows for machines."""

import json
import random
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from dgmr.errors import DgmrError
from dgmr.report import sweep
from dgmr.report.page import report
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from report.test_report import PARAMS, STAGES, headless, made, text

RATIO, METHOD = "prune.ratio", "prune.method"


def swept(results: Path, points: dict[str, tuple[dict[str, Any], dict[str, float]]]) -> dict:
    """Points with their values and what they changed in the run's own metrics; and the run itself."""
    made(results)
    flat = json.loads((results / "metrics.json").read_text())
    found = {results: {RATIO: 1.0, METHOD: "gram_schmidt"}}
    for name, (values, changes) in points.items():
        folder = results / "sweep" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(flat | changes))
        (folder / "report.html").touch()
        found[folder] = values
    return found


def point(ratio: float, method: str, params: int, top1: float, cosine: float = 0.9) -> tuple:
    changes = {"student.params": params, "student.top1": top1, "student.cosine": cosine}
    return {RATIO: ratio, METHOD: method}, changes


# The run itself has a million parameters and 89.3%.
POINTS = {
    "a": point(2.0, "gram_schmidt", 1_500_000, 90.0),
    "b": point(0.5, "gram_schmidt", 500_000, 85.0, 0.95),
    "c": point(2.0, "magnitude", 1_500_000, 88.0),
    "d": point(0.5, "magnitude", 500_000, 84.5, 0.97),
}


def compared(results: Path, points: dict = POINTS, params: dict = PARAMS) -> str:
    """The page's HTML."""
    report(results, STAGES, params, results, results, swept(results, points))
    return (results / "report.html").read_text(encoding="utf-8")


def rows(results: Path) -> list[dict[str, Any]]:
    return json.loads((results / "sweep.json").read_text())


def test_front_is_what_no_other_beats() -> None:
    def beats(a: tuple, b: tuple) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    for seed in range(500):
        draw = random.Random(seed)
        count, values = draw.randrange(25), draw.randrange(1, 12)  # few values: many ties
        pairs = [(draw.randrange(values), draw.randrange(values) / 4) for _ in range(count)]
        expected = [not any(beats(other, pair) for other in pairs) for pair in pairs]
        assert sweep.front([p[0] for p in pairs], [p[1] for p in pairs]) == expected, seed


def test_rows_for_machines_are_by_size_and_say_who_is_on_the_front(results: Path) -> None:
    compared(results)
    found = rows(results)
    assert [row["point"] for row in found] == ["b", "d", None, "a", "c"]
    assert [row["on_front"] for row in found] == [True, False, True, True, False]
    assert found[0]["values"] == {RATIO: 0.5, METHOD: "gram_schmidt"}
    assert found[2]["metrics"] == json.loads((results / "metrics.json").read_text())
    for row in found:
        if row["point"]:
            file = results / "sweep" / row["point"] / "metrics.json"
            assert row["metrics"] == json.loads(file.read_text())


def test_table_lists_every_run_with_a_link_that_resolves(results: Path) -> None:
    html = compared(results)
    seen = text(html)
    assert "5 runs that differ in ratio, method, and nothing else. On the front, 3 of them:" in seen
    assert "0.5 gram_schmidt 0.500 0.0200 85.00 0.0120 × 2.40 ● report" in seen
    assert "0.5 magnitude 0.500 0.0200 84.50 0.0120 × 2.40 report" in seen
    assert "1 gram_schmidt 1.00 0.0200 89.30 0.0120 × 2.40 ● this page" in seen
    assert "chance may have chosen the better one" in seen
    links = re.findall(r'<a href="([^"]+)"', html)
    assert links == [f"sweep/{name}/report.html" for name in ("b", "d", "a", "c")]
    assert all((results / link).is_file() for link in links)


def test_chart_tells_methods_and_values_apart(results: Path) -> None:
    (figure,) = re.findall(r"<h2>Sweep</h2>.*?<figure>(.*?)</figure>", compared(results), re.DOTALL)
    said = re.findall(r">([^<>]+)</text>", figure)
    assert {"method", "gram_schmidt", "magnitude", "this run", "teacher", "4 M"} <= set(said)
    assert said.count("ratio 2") == said.count("ratio 0.5") == 2
    for colour in ("accent", "second", "muted"):
        assert f"var(--{colour})" in figure
    assert not re.search("#00000[1-9]", figure)


def test_page_with_a_sweep_still_stands_alone(results: Path) -> None:
    html = compared(results)
    assert html.count("<svg ") == 3 + 3  # three charts, and one a block
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))
    used = re.findall(r"(?:href=\"#|url\(#)([^\")]+)", html)
    assert used and set(used) <= set(identifiers)


def test_without_points_the_page_is_as_it_was(results: Path) -> None:
    before = made(results)
    compared(results)
    report(results, STAGES, PARAMS, results, results, {results: {}})
    assert (results / "report.html").read_text(encoding="utf-8") == before
    assert "Sweep" not in before
    assert not (results / "sweep.json").exists()  # that of the sweep before


def test_students_without_classifier_are_compared_by_cosine(results: Path) -> None:
    headless(results)
    points = {
        name: (values, {k: v for k, v in c.items() if "top1" not in k})
        for name, (values, c) in POINTS.items()
    }
    html = compared(results, points)
    seen = text(html)
    assert "Cosine to the teacher of each run’s student" in seen
    assert "0.5 magnitude 0.500 0.0200 0.9700 0.0120 × 2.40 ● report" in seen
    assert "chance" not in seen
    assert [row["on_front"] for row in rows(results)] == [True, False, True, False, False]


def test_point_without_metrics_is_told(results: Path) -> None:
    found = swept(results, POINTS)
    (results / "sweep/c/metrics.json").unlink()
    with pytest.raises(DgmrError, match=r"sweep/c/metrics\.json is missing: run snakemake again"):
        report(results, STAGES, PARAMS, results, results, found)


def test_values_of_others_are_escaped(results: Path) -> None:
    values, changes = POINTS["a"]
    html = compared(results, {"a": (values | {METHOD: "<b>&$_$"}, changes)})
    assert "<b>" not in html and html.count("&lt;b&gt;&amp;$_$") == 2  # the table, the legend


def run(values: dict[str, Any], params: int, name: str | None = "p") -> dict[str, Any]:
    metrics = {"student.params": params, "student.top1": 50.0 + params / 100}
    metrics |= {"teacher.top1": 60.0, "teacher.params": 2000}
    return {"point": name, "values": values, "metrics": metrics, "on_front": False}


@pytest.mark.parametrize(
    ("runs", "key"),
    [
        # The widths follow from the ratio, so the methods are what there is to compare.
        ([({RATIO: r, METHOD: m}, r) for r in (1, 2) for m in "ab"], METHOD),
        # A budget's sizes differ by method too; names go before numbers.
        (
            [
                ({"prune.budget": b, METHOD: m}, 10 * b + i)
                for b in (1, 2)
                for i, m in enumerate("abc")
            ],
            METHOD,
        ),
        (
            [
                ({RATIO: r, "distill.stages.all.lr": lr}, r)
                for r in (1, 2, 3)
                for lr in (1e-3, 1e-4)
            ],
            "distill.stages.all.lr",
        ),
        # Too many values to tell apart, and one key alone, whose values the labels tell.
        ([({RATIO: r, "prune.seed": s}, r) for r in (1, 2) for s in range(9)], None),
        ([({RATIO: r}, 10 * r + i) for r in (1, 2) for i in (0, 1)], None),
        ([({METHOD: m, "prune.seed": s}, 5) for m in "ab" for s in (1, 2)], None),
    ],
)
def test_series_are_of_the_key_that_size_does_not_tell(runs: list, key: str | None) -> None:
    assert sweep.series([run(values, params) for values, params in runs]) == key


@pytest.mark.parametrize("count", [2, 5, 41, 200])
@pytest.mark.parametrize("seed", range(5))
def test_no_label_covers_another_or_a_point(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    runs = [
        run({RATIO: float(draw.randrange(4)), METHOD: draw.choice("abc")}, 0, str(number))
        for number in range(count)
    ]
    for each in runs:
        size = 1000 + 100 * int(each["values"][RATIO])
        each["metrics"] |= {"student.params": size, "student.top1": draw.uniform(40, 61)}
    students = [each["metrics"] for each in runs]
    on_front = sweep.front(
        [each["student.params"] for each in students], [each["student.top1"] for each in students]
    )
    for each, is_on_front in zip(runs, on_front, strict=True):
        each["on_front"] = is_on_front
    runs[0]["point"] = None
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **b: (figures.append(self), savefig(self, *a, **b))
    )
    sweep.chart(runs, "top1")
    (figure,) = figures
    with matplotlib.rc_context({"font.size": 9}):
        figure.draw_without_rendering()
        (axes,) = figure.axes
        labels = [
            a for a in axes.texts if isinstance(a, Annotation) and "teacher" not in a.get_text()
        ]
        boxes = [label.get_window_extent() for label in labels]
    assert boxes
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        for each in runs:
            size, top1 = (each["metrics"][f"student.{name}"] for name in ("params", "top1"))
            assert not box.contains(*axes.transData.transform((size / 1e6, top1)))
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
    if count == 2:
        assert len(labels) == 2


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (1.0, "1"),
        (0.0003, "0.0003"),
        (7, "7"),
        ("taylor", "taylor"),
        (None, "null"),
        ([0, 1], "[0, 1]"),
        ({"pooled": 1.0, "blocks": [0, 1]}, "pooled 1, blocks [0, 1]"),
    ],
    ids=str,
)
def test_values_are_shown_as_short_as_they_can_be(value: Any, seen: str) -> None:
    assert sweep.shown(value) == seen
