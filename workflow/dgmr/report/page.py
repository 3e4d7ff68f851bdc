"""One HTML page for people, beside the flat files for machines and the exported student."""

import io
import math
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dgmr.files import replaced_files, write_json
from dgmr.report import card, metrics
from dgmr.report.metrics import PRUNED, STUDENT, TEACHER, Results, Row

METRICS, CURVES, PAGE = "metrics.json", "curves.json", "report.html"
_DASH = "–"
# Charts are drawn in these colours, then named after the page's, so they follow its dark mode.
_INK, _MUTED, _RULE, _ACCENT, _SECOND = (f"#00000{digit}" for digit in range(1, 6))
_PAGE_COLOURS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
}
_CURVE_COLOURS = {"loss": _INK, "patch_tokens": _ACCENT, "pooled": _SECOND, "blocks": _MUTED}
_CURVE_NAMES = {
    "loss": "weighted loss",
    "patch_tokens": "patch tokens",
    "pooled": "pooled output",
    "blocks": "blocks",
}
_CHART_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": _RULE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "ytick.left": False,
    "ytick.minor.left": False,
}
_CHART_INCHES = (4.7, 3.3)
_SPARK_POINTS = 80
_SPARK_WIDTH, _SPARK_HEIGHT = 120, 24


def report(
    results: Path,
    stages: list[str],
    params: dict[str, Any],
    output: Path,
    shared: Path,
    points: Sequence[Path] = (),
) -> None:
    """Write what the files in ``results`` say of the chain to ``output``.

    ``report.html``, ``metrics.json``, ``curves.json`` and, last, ``student/`` (the last stage's artefact,
    with a model card). ``params`` are the resolved ones, for card and page; teacher and data are in
    ``shared``; ``points`` are the results of a sweep's points, which the page compares.

    Raises:
        DgmrError: a file is missing, or is about other weights than those that are there.
    """
    found = metrics.read(results, stages, shared)
    flat, curves = metrics.flat(found), metrics.curves(found)
    text = card.render(found, params, _figures(found))
    page = render(found, flat, curves, params)
    # The student's folder has the stamp of them all, so it is what vouches for the others.
    with replaced_files(output, STUDENT) as folder:
        write_json(folder / METRICS, flat)
        write_json(folder / CURVES, curves)
        (folder / PAGE).write_text(page, encoding="utf-8")
        # Bytes of its own: who edits the exported student must not edit the stage's result.
        (folder / STUDENT).mkdir()
        for path in found.folders[found.last_stage].iterdir():
            if path.suffix != ".stamp":
                shutil.copyfile(path, folder / STUDENT / path.name)
        (folder / STUDENT / card.CARD).write_text(text, encoding="utf-8")


def render(
    found: Results, flat: dict[str, float], curves: list[Row], params: dict[str, Any]
) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": _count, "share": _share}
    today = date.today()
    accuracy = "top1" if "top1" in found.models[TEACHER] else "cosine"
    return environment.get_template("template.html.jinja").render(
        teacher=params["teacher"]["model"],
        date=f"{today.day} {today:%B %Y}",
        headline=_headline(found, flat, curves),
        columns=_COLUMNS,
        models=[_model_row(found, model) for model in found.models],
        evaluation=found.models[TEACHER],
        margin=_margin(found.models[TEACHER]),
        speed=found.speed,
        loss_chart=_loss_chart(curves),
        loss_keys={n: text for n, text in _CURVE_NAMES.items() if any(n in row for row in curves)},
        size_chart=_size_chart(found, accuracy),
        size_chart_shows={"top1": "Top-1 accuracy", "cosine": "Cosine to the teacher"}[accuracy],
        blocks=[_block_row(name, block) for name, block in found.blocks.items()],
        block_summary=_block_summary(list(found.blocks.values())),
        samples=found.data["samples"],
        data_tables=_data_tables(found.data),
        params=yaml.safe_dump(params, sort_keys=False, allow_unicode=True),
        provenance=found.provenance,
    )


def _headline(found: Results, flat: dict[str, float], curves: list[Row]) -> list[str]:
    """The outcome in plain sentences."""
    size = (
        f"The student keeps {_share(1 - flat['reduction.params'])} of the teacher’s parameters"
        f" and {_share(1 - flat['reduction.flops'])} of its FLOPs,"
        f" runs {flat['speedup.images_per_s']:.1f} times as fast"
    )
    samples = f"{_count(curves[-1]['samples'])} samples of distillation"
    if "teacher.top1" in flat:
        teacher, pruned, student = (flat[f"{m}.top1"] for m in (TEACHER, PRUNED, STUDENT))
        lost = round(teacher - student, 2)
        change = f"{'loses' if lost > 0 else 'gains'} {abs(lost):.2f} points of"
        if lost == 0:
            change = "has the same"
        return [
            f"{size}, and {change} top-1 accuracy: {student:.2f}% against {teacher:.2f}%.",
            f"Right after pruning it scored {pruned:.2f}%; {samples} brought it to {student:.2f}%.",
        ]
    # A model that still is the teacher, to the bit, is not compared with it.
    pruned, student = (found.models[m].get("cosine", 1.0) for m in (PRUNED, found.last_stage))
    return [
        f"{size}, and its output has a cosine of {student:.4f} to the teacher’s.",
        f"Right after pruning it was {pruned:.4f}; {samples} brought it to {student:.4f}.",
    ]


def _margin(teacher: Row) -> float | None:
    """Half the 95% interval of the teacher's top-1, in points: what chance does to a sample."""
    if "top1" not in teacher:
        return None
    hit = teacher["top1"] / 100
    return 100 * 1.96 * math.sqrt(hit * (1 - hit) / teacher["samples"])


class _Column(NamedTuple):
    """A column of the table of models: how to show a value, and how its change to the teacher."""

    metric: str
    title: str
    show: Callable[[float], str]
    change: Callable[[float, float], str] | None = None


def _points(value: float) -> str:
    return f"{value:.2f}"


def _points_change(value: float, teacher: float) -> str:
    return _signed(f"{value - teacher:+.2f}")


def _fraction_change(value: float, teacher: float) -> str:
    return _signed(f"{value / teacher - 1:+.1%}")


def _times(value: float, teacher: float) -> str:
    return f"× {value / teacher:.2f}"


_COLUMNS = (
    _Column("top1", "Top-1, %", _points, _points_change),
    _Column("top5", "Top-5, %", _points, _points_change),
    _Column("same_top1", "Same top-1, %", _points),
    _Column("feature_mse", "Feature MSE", lambda value: _significant(value)),
    _Column("cosine", "Cosine", lambda value: f"{value:.4f}"),
    _Column("params", "Params, M", lambda value: _significant(value / 1e6), _fraction_change),
    _Column("flops", "GFLOPs", lambda value: _significant(value / 1e9), _fraction_change),
    _Column("images_per_s", "Images/s", lambda value: _significant(value), _times),
)


def _model_row(found: Results, model: str) -> Row:
    """Name, role, and a (value, change to the teacher) of every column."""
    values, teacher = found.models[model], found.models[TEACHER]
    cells = []
    for column in _COLUMNS:
        value = values.get(column.metric)
        change = ""
        if value is not None and column.change and model != TEACHER:
            change = column.change(value, teacher[column.metric])
        cells.append((_DASH if value is None else column.show(value), change))
    return {"name": model, "is_student": model == found.last_stage, "cells": cells}


def _figures(found: Results) -> list[list[str]]:
    """The table of the model card: titles, then teacher, pruned and student; no empty column."""
    models = {TEACHER: TEACHER, PRUNED: PRUNED, STUDENT: found.last_stage}
    rows = [
        ["model", *(column.title for column in _COLUMNS)],
        *(
            [name, *(value for value, _ in _model_row(found, model)["cells"])]
            for name, model in models.items()
        ),
    ]
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {_DASH}]
    return [list(row) for row in zip(*columns, strict=True)]


def _block_row(name: str, block: Row) -> Row:
    # For Gram-Schmidt, whose gains are squared, the residual norms. An MLP that keeps all may keep
    # more than were ordered.
    norms = [math.sqrt(max(gain, 0.0)) for gain in block["gains"]]
    ordered = min(block["kept"], len(norms))
    return {
        "name": name,
        "before": block["hidden_features"],
        "after": block["kept"],
        "error_plain": block.get("error_plain"),
        "error_refit": block.get("error_refit"),
        "ridge": block.get("ridge"),
        "at_cut": norms[ordered - 1] / (norms[0] or 1.0),
        "spark": _spark(norms, ordered),
    }


def _block_summary(blocks: list[Row]) -> Row:
    """Hidden units of all MLPs before and after, and the median errors where fc2 was refitted."""
    refitted = [block for block in blocks if "error_refit" in block]
    return {
        "before": sum(block["hidden_features"] for block in blocks),
        "after": sum(block["kept"] for block in blocks),
        "refitted": bool(refitted),
        **{
            name: statistics.median(block[name] for block in refitted) if refitted else None
            for name in ("error_plain", "error_refit")
        },
    }


def _spark(norms: list[float], kept: int) -> dict[str, Any]:
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


def _data_tables(data: Row) -> list[Row]:
    """What became of the table's rows, and of the images of those drawn: a title and counts."""
    table, images = dict(data["table"]), dict(data["images"])
    rows, selected = table.pop("rows"), table.pop("selected")
    fine = images.pop("ok")
    return [
        {
            "title": "Rows of the table",
            "total": rows,
            "counts": [
                *((f"dropped: {reason}", number) for reason, number in table.items()),
                ("passed, not drawn", rows - selected - sum(table.values())),
                ("drawn", selected),
            ],
        },
        {
            "title": "Images of the rows drawn",
            "total": fine + sum(images.values()),
            "counts": [*images.items(), ("training images", fine)],
        },
    ]


def _loss_chart(curves: list[Row]) -> Markup:
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
                axes.axvline(start, color=_MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
            start = end

    return _chart("loss", "Loss curves", draw)


def _size_chart(found: Results, accuracy: str) -> Markup:
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
        axes.plot(xs, ys, color=_MUTED, linewidth=0.8, zorder=1)
        for name, x, y in points:
            colour = {TEACHER: _INK, found.last_stage: _ACCENT}.get(name, _MUTED)
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

    return _chart("size", f"{accuracy} against parameters", draw)


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """The ``values``, pushed up where they are closer to each other than ``gap``."""
    places = list(values)
    previous = -math.inf
    for index in sorted(range(len(places)), key=places.__getitem__):
        places[index] = previous = max(places[index], previous + gap)
    return places


def _chart(name: str, label: str, draw: Callable[[Axes], None]) -> Markup:
    """What ``draw`` draws, as SVG to stand within a page beside others."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_CHART_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=_CHART_INCHES, layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1 and so on: the same in every chart
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', r"<svg \1 role='img'>", svg, count=1)
    for drawn, named in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, named)
    return Markup(svg)


def _count(number: int) -> str:
    return f"{number:,}"


def _significant(value: float) -> str:
    """Three significant digits, all digits before the point; tiny values with an exponent."""
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _share(fraction: float) -> str:
    """A fraction in percent, with a decimal where it is small."""
    return f"{fraction:.0%}" if fraction >= 0.1 or fraction == 0 else f"{fraction:.1%}"


def _signed(text: str) -> str:
    """With a true minus sign, and no sign for zero."""
    return text.replace("-", "−") if re.search("[1-9]", text) else text[1:]
