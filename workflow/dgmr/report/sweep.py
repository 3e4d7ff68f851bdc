"""The runs of a sweep side by side: which are on the Pareto front of size and accuracy."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from dgmr.params import short_name
from dgmr.report import charts, metrics
from dgmr.report.charts import ACCENT, INK, MUTED, SECOND
from dgmr.report.metrics import Row

THIS_RUN = "this run"
_INCHES = (9.6, 4.2)
_COLOURS, _MARKERS = (ACCENT, SECOND, INK), "os^DvPX*"
_ALL_LABELLED = 12
# Where a label may stand: points from its marker, and what of it is there. The front comes from below
# and goes on to the right, so the other sides are tried first.
_PLACES = (
    (-6, 5, "right", "bottom"),
    (6, 5, "left", "bottom"),
    (6, -5, "left", "top"),
    (-6, -5, "right", "top"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
)


class _Student(NamedTuple):
    """A run in the chart."""

    x: float
    """Parameters, millions."""
    y: float
    """Accuracy: percent, or a cosine."""
    run: Row


def gather(swept: Mapping[Path, Row], results: Path, flat: Mapping[str, float]) -> list[Row]:
    """``point``, ``values``, ``metrics`` and ``on_front`` of every run, the smallest student first.

    The run in ``results``, whose metrics are ``flat``, has no ``point``. Without points there are no rows.

    Raises:
        DgmrError: a point has no metrics.
    """
    runs: list[Row] = [
        {
            "point": None if folder == results else folder.name,
            "values": values,
            "metrics": flat if folder == results else metrics.load(folder / "metrics.json"),
        }
        for folder, values in swept.items()
    ]
    if len(runs) < 2:
        return []
    accuracy = "top1" if "teacher.top1" in flat else "cosine"
    sizes = [run["metrics"]["student.params"] for run in runs]
    accuracies = [accuracy_of(run, accuracy) for run in runs]
    for run, on_front in zip(runs, front(sizes, accuracies), strict=True):
        run["on_front"] = on_front
    runs.sort(key=lambda run: (run["metrics"]["student.params"], -accuracy_of(run, accuracy)))
    return runs


def accuracy_of(run: Row, accuracy: str) -> float:
    """Of the run's student; one that still is the teacher, to the bit, has no cosine to it."""
    return run["metrics"].get(f"student.{accuracy}", 1.0)


def front(sizes: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Of each, whether no other is as small and as accurate, and better in one of the two."""
    best, found = -math.inf, set()
    for size, accuracy in sorted(zip(sizes, accuracies, strict=True), key=lambda p: (p[0], -p[1])):
        if accuracy > best:
            best = accuracy
            found.add((size, accuracy))
    return [pair in found for pair in zip(sizes, accuracies, strict=True)]


def shown(value: Any) -> str:
    """A value of the params, as short as it can be told."""
    match value:
        case str():
            return value
        case float():
            return f"{value:g}"
        case dict():
            return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    return json.dumps(value)


def chart(runs: Sequence[Row], accuracy: str) -> Markup:
    """``accuracy`` (top1 or cosine) of every student against its parameters, and the front."""
    students = [
        _Student(run["metrics"]["student.params"] / 1e6, accuracy_of(run, accuracy), run)
        for run in runs
    ]
    told_apart = series(runs)

    def draw(axes: Axes) -> None:
        axes.margins(x=0.1, y=0.15)
        _draw_students(axes, students, told_apart)
        teacher = runs[0]["metrics"]
        level = teacher.get(f"teacher.{accuracy}", 1.0)
        axes.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        axes.set(xlabel="parameters, M", xlim=axes.get_xlim())
        axes.xaxis.set_major_locator(MaxNLocator(8))
        corners = sorted({(s.x, s.y) for s in students if s.run["on_front"]})
        xs, ys = zip(*corners, (axes.get_xlim()[1], corners[-1][1]), strict=True)
        axes.plot(xs, ys, color=MUTED, linewidth=0.8, drawstyle="steps-post", zorder=1)
        axes.annotate(
            f"teacher\n{teacher['teacher.params'] / 1e6:.3g} M",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=MUTED,
        )
        assert isinstance(axes.figure, Figure)
        axes.figure.draw_without_rendering()  # now it is known where all is
        lines = [((axes.get_xlim()[0], level), (axes.get_xlim()[1], level))]
        for (left, low), (right, high) in pairwise(zip(xs, ys, strict=True)):
            lines += [((left, low), (right, low)), ((right, low), (right, high))]
        taken = [Bbox(axes.transData.transform(line)).padded(1) for line in lines]
        places = axes.transData.transform([(s.x, s.y) for s in students])
        taken += [Bbox([place, place]).padded(6) for place in places]
        _label(axes, students, told_apart, taken)

    return charts.chart("sweep", f"{accuracy} of all runs against parameters", draw, _INCHES)


def series(runs: Sequence[Row]) -> str | None:
    """The swept key that is shown in colours: of few values, which come in several sizes.

    Names are preferred to numbers; None where no key of several is such.
    """
    found = []
    keys = list(runs[0]["values"])
    for key in keys if len(keys) > 1 else ():
        values = {shown(run["values"][key]) for run in runs}
        sizes = {(shown(run["values"][key]), run["metrics"]["student.params"]) for run in runs}
        if 1 < len(values) <= len(_MARKERS) and len(sizes) > len(values):
            is_name = isinstance(runs[0]["values"][key], str)
            found.append((not is_name, len(values), key))
    return min(found)[-1] if found else None


def _draw_students(axes: Axes, students: Sequence[_Student], told_apart: str | None) -> None:
    """Each in the colour and shape of its value of the key ``told_apart``, and the legend."""
    looks: dict[str, dict[str, Any]] = {}
    places: dict[str, list[tuple[float, float]]] = {}
    for x, y, run in students:
        value = shown(run["values"][told_apart]) if told_apart else ""
        number = len(looks)
        look = looks.setdefault(
            value,
            {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number]},
        )
        filling = look["color"] if run["on_front"] else "none"
        axes.plot(x, y, **look, markerfacecolor=filling, markersize=7, linestyle="none")
        places.setdefault(value, []).append((x, y))
    if told_apart:
        # With one key besides, a line leads through its values.
        for value, line in places.items() if len(students[0].run["values"]) == 2 else ():
            axes.plot(*zip(*line, strict=True), color=looks[value]["color"], lw=0.8, alpha=0.4)
        handles = [Line2D([], [], **look, label=value, ls="none") for value, look in looks.items()]
        axes.figure.legend(
            handles=handles,
            title=short_name(told_apart),
            loc="outside right upper",
            frameon=False,
            alignment="left",
        )


def _label(
    axes: Axes, students: Sequence[_Student], told_apart: str | None, taken: list[Bbox]
) -> None:
    """Tell the students' values where nothing is yet, the most important first; or not at all."""
    this_run_first = sorted(
        students, key=lambda s: (s.run["point"] is not None, not s.run["on_front"], -s.y)
    )
    for x, y, run in this_run_first:
        if len(students) > _ALL_LABELLED and not run["on_front"] and run["point"] is not None:
            continue
        told = (
            f"{short_name(key)} {shown(value)}"
            for key, value in run["values"].items()
            if key != told_apart
        )
        text = THIS_RUN if run["point"] is None else ", ".join(told)
        for right, up, ha, va in _PLACES:
            label = axes.annotate(
                text,
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                ha=ha,
                va=va,
                weight="bold" if run["point"] is None else "normal",
            )
            label.set_in_layout(False)  # or the axes would make room, and all else move
            box = label.get_window_extent()
            is_within = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if is_within and not any(map(box.overlaps, taken)):
                taken.append(box)
                break
            label.remove()
