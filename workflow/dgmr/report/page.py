"""One HTML page for people, beside the flat files for machines and the exported student."""

import math
import re
import shutil
import statistics
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from dgmr.files import replaced_files, write_json
from dgmr.params import short_name
from dgmr.report import card, charts, metrics, sweep
from dgmr.report.metrics import PRUNED, STUDENT, TEACHER, Results, Row

METRICS, CURVES, SWEEP, PAGE = "metrics.json", "curves.json", "sweep.json", "report.html"
_DASH = "–"


def report(
    results: Path,
    stages: list[str],
    params: dict[str, Any],
    output: Path,
    shared: Path,
    swept: Mapping[Path, Row] | None = None,
) -> None:
    """Write what the files in ``results`` say of the chain to ``output``.

    ``report.html``, ``metrics.json``, ``curves.json``, with a sweep ``sweep.json`` and, last, ``student/``
    (the last stage's artefact, with a model card).

    Args:
        results: of the run.
        stages: names, in their order.
        params: the resolved ones, for card and page.
        output: where all is written.
        shared: where teacher and data are.
        swept: by their results, the run itself and the points of its sweep, which have their reports:
            the values of the swept keys.

    Raises:
        DgmrError: a file is missing, or is about other weights than those that are there.
    """
    found = metrics.read(results, stages, shared)
    flat, curves = metrics.flat(found), metrics.curves(found)
    runs = sweep.gather(swept or {}, results, flat)
    text = card.render(found, params, _figures(found))
    page = render(found, flat, curves, params, runs)
    if not runs:
        (output / SWEEP).unlink(missing_ok=True)  # of a sweep that is no more
    # The student's folder has the stamp of them all, so it is what vouches for the others.
    with replaced_files(output, STUDENT) as folder:
        write_json(folder / METRICS, flat)
        write_json(folder / CURVES, curves)
        if runs:
            write_json(folder / SWEEP, runs)
        (folder / PAGE).write_text(page, encoding="utf-8")
        # Bytes of its own: who edits the exported student must not edit the stage's result.
        (folder / STUDENT).mkdir()
        for path in found.folders[found.last_stage].iterdir():
            if path.suffix != ".stamp":
                shutil.copyfile(path, folder / STUDENT / path.name)
        (folder / STUDENT / card.CARD).write_text(text, encoding="utf-8")


def render(
    found: Results,
    flat: dict[str, float],
    curves: list[Row],
    params: dict[str, Any],
    runs: list[Row],
) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "share": _share,
        "significant": _significant,
        "value": sweep.shown,
        "short": short_name,
    }
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
        loss_chart=charts.loss(curves),
        loss_keys={
            n: text for n, text in charts.CURVE_NAMES.items() if any(n in row for row in curves)
        },
        size_chart=charts.size(found, accuracy),
        accuracy=accuracy,
        accuracy_title={"top1": "Top-1 accuracy", "cosine": "Cosine to the teacher"}[accuracy],
        runs=runs,
        sweep_chart=sweep.chart(runs, accuracy) if runs else None,
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
        "spark": charts.spark(norms, ordered),
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
