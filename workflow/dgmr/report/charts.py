"""The page's charts: SVG in the page's own colours, so that they follow its dark mode."""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dgmr.report.metrics import TEACHER, Results, Row

# Drawn in these, then named after the page's.
INK, MUTED, RULE, ACCENT, SECOND = (f"#00000{digit}" for digit in range(1, 6))
_PAGE_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
}
_CURVE_COLOURS = {"loss": INK, "patch_tokens": ACCENT, "pooled": SECOND, "blocks": MUTED}
CURVE_NAMES = {
    "loss": "weighted loss",
    "patch_tokens": "patch tokens",
    "pooled": "pooled output",
    "blocks": "blocks",
}
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.color": INK,
    "text.parse_math": False,  # what others named may have a $
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "ytick.minor.left": False,
}
_INCHES = (4.7, 3.3)
_SPARK_POINTS = 80
_SPARK_WIDTH, _SPARK_HEIGHT = 120, 24


def chart(
    name: str,
    label: str,
    draw: Callable[[Axes], None],
    inches: tuple[float, float] = _INCHES,
) -> Markup:
    """What ``draw`` draws, as SVG to stand within a page beside others; ``label`` is read aloud."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1 and so on: the same in every chart
    image = f'role="img" aria-label="{label}"'
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', rf"<svg \1 {image}>", svg, count=1)
    for drawn, named in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, named)
    return Markup(svg)


def loss(curves: list[Row]) -> Markup:
    """Loss and its terms (log scale) over the samples of all stages, with the stages' names."""

    def draw(axes: Axes) -> None:
        samples = [row["samples"] for row in curves]
        for name, colour in _CURVE_COLOURS.items():
            if not any(name in row for row in curves):
                continue
            values = [row.get(name, math.nan) for row in curves]  # a gap where a stage has no such
            axes.plot(samples, values, color=colour, linewidth=1.4, marker="o", markersize=1.8)
        axes.set(xlabel="distillation samples", yscale="log", xlim=(0, samples[-1]))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        low, high = axes.get_ylim()
        decades = math.log10(high / low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        start = 0
        for stage, rows in groupby(curves, key=lambda row: row["stage"]):
            end = list(rows)[-1]["samples"]
            axes.text(
                (start + end) / 2, 1.03, stage, transform=axes.get_xaxis_transform(), ha="center"
            )
            if start:
                axes.axvline(start, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
            start = end

    return chart("loss", "Loss curves", draw)


def size(found: Results, accuracy: str) -> Markup:
    """``accuracy`` (top1 or cosine) of every model against its parameters."""
    # The teacher is not compared with itself: its cosine is 1.
    points = [
        (name, values["params"] / 1e6, values.get(accuracy, 1.0))
        for name, values in found.models.items()
    ]
    show = {"top1": lambda value: f"{value:.1f}%", "cosine": lambda value: f"{value:.4f}"}[accuracy]

    def draw(axes: Axes) -> None:
        widest = max(x for _, x, _ in points)
        axes.margins(y=0.15)
        _, xs, ys = zip(*points[1:], strict=True)
        axes.plot(xs, ys, color=MUTED, linewidth=0.8, zorder=1)
        for name, x, y in points:
            colour = {TEACHER: INK, found.last_stage: ACCENT}.get(name, MUTED)
            axes.plot(x, y, "o", color=colour, markersize=7)
        low, high = axes.get_ylim()
        places = _apart([y for *_, y in points[1:]], 0.07 * (high - low))
        axes.set_ylim(low, max(high, *(place + 0.07 * (high - low) for place in places)))
        for (name, x, y), place in zip(points, [points[0][2], *places], strict=True):
            right = name == TEACHER or x < 0.6 * widest
            axes.annotate(
                f"{name} {show(y)}",
                (x, place),
                xytext=(8 if right else -8, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center",
                weight="bold" if name == found.last_stage else "normal",
            )
        # Room on the right for the teacher's label.
        axes.set(xlabel="parameters, M", xlim=(0, 1.45 * widest))
        axes.xaxis.set_major_locator(MaxNLocator(6))

    return chart("size", f"{accuracy} against parameters", draw)


def spark(norms: list[float], kept: int) -> dict[str, Any]:
    """Outlines of the areas under the ``norms`` of kept and of dropped units, for SVG."""
    largest = max(norms) or 1.0

    def area(start: int, stop: int) -> str:
        # Both ends belong to the outline, however wide the steps between them.
        step = math.ceil((stop - start) / _SPARK_POINTS) or 1
        places = [*range(start, stop, step), stop]
        points = [
            f"{_SPARK_WIDTH * i / len(norms):.1f},"
            f"{_SPARK_HEIGHT * (1 - norms[min(i, len(norms) - 1)] / largest):.1f}"
            for i in places
        ]
        first, last = points[0].split(",")[0], points[-1].split(",")[0]
        return f"M{first},{_SPARK_HEIGHT} L{' '.join(points)} L{last},{_SPARK_HEIGHT} Z"

    return {
        "width": _SPARK_WIDTH,
        "height": _SPARK_HEIGHT,
        "kept": area(0, kept),
        "dropped": area(kept, len(norms)) if kept < len(norms) else None,
    }


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The ``values``, pushed up where they are closer to each other than ``gap``."""
    places = list(values)
    previous = -math.inf
    for index in sorted(range(len(places)), key=places.__getitem__):
        places[index] = previous = max(places[index], previous + gap)
    return places
