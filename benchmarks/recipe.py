"""How many distillation samples the plain recipe needs to match the compensated one.

Takes the teacher, data, features and orders of a finished default run (``make run``), and compares,
in one run on one machine:

- ours: least-squares compensation, then the stages of params.yaml as they are;
- plain: no compensation, the same stages with their samples multiplied by 1, 2, 4, ... until the
  student's feature MSE on the evaluation images is no larger than ours, or ``--most`` is reached.

Usage: python benchmarks/recipe.py [--most 8] [--output docs/benchmarks/recipe.json]
The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from dgmr import artefact, params
from dgmr.distill.trainer import train
from dgmr.evaluate.accuracy import evaluate
from dgmr.files import read_json, write_json
from dgmr.prune import prune_model

RESULTS = Path("results")


def main() -> None:
    """Measure, print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--most", type=int, default=8, help="largest multiple of the samples")
    parser.add_argument("--output", type=Path, help="where to write the result as JSON, too")
    options = parser.parse_args()
    config = params.read(Path("params.yaml"))
    if config.prune.compensate != "least_squares":
        parser.error("params.yaml must have prune.compensate: least_squares")
    if not (RESULTS / "metrics.json").is_file():
        parser.error("no results/metrics.json here: finish a default run first (make run)")

    teacher = read_json(RESULTS / "evaluate/teacher.json")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch, "plain")
        student = prune_model(artefact.load(RESULTS / "teacher"), config.prune.ratio)
        artefact.save(start, student, {"stage": "prune", "compensate": "none"})
        for name, pruned in (("ours", RESULTS / "prune"), ("plain", start)):
            multiple = 1
            while multiple <= options.most:
                student = _distilled(pruned, config.distill, multiple, Path(scratch, name))
                row = {"recipe": name, "multiple": multiple} | _scores(student, config)
                rows.append(row | {"pruned": _scores(pruned, config)})
                print(_line(rows[-1], teacher["top1"]), flush=True)
                if row["feature_mse"] <= rows[0]["feature_mse"]:
                    break
                multiple *= 2

    matched = rows[-1]["feature_mse"] <= rows[0]["feature_mse"]
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "teacher_top1": teacher["top1"],
        "rows": rows,
        "plain_over_ours_samples": rows[-1]["multiple"] if matched else None,
        "plain_not_matched_at": None if matched else rows[-1]["multiple"],
    }
    if options.output:
        write_json(options.output, result)
    print(json.dumps(result))


def _distilled(pruned: Path, config: params.Distill, multiple: int, folder: Path) -> Path:
    """Run all stages with ``multiple`` times their samples; the last student's artefact."""
    parent = pruned
    for name, stage in config.stages.items():
        longer = stage.model_copy(update={"samples": stage.samples * multiple})
        output = folder / str(multiple) / name
        train(
            name,
            parent,
            RESULTS / "teacher",
            RESULTS / "data",
            RESULTS / "features",
            longer,
            output,
        )
        parent = output
    return parent


def _scores(model: Path, config: params.Params) -> dict[str, Any]:
    output = model / "evaluation.json"
    evaluate(
        "model",
        model,
        RESULTS / "teacher",
        RESULTS / "data/eval",
        config.evaluate.batch_size,
        output,
    )
    found = read_json(output)
    return {name: found[name] for name in ("top1", "feature_mse", "same_top1")}


def _line(row: dict[str, Any], teacher_top1: float) -> str:
    return (
        f"{row['recipe']:>6} x{row['multiple']:<3} pruned {row['pruned']['top1']:6.2f}%"
        f" mse {row['pruned']['feature_mse']:.5f}   distilled {row['top1']:6.2f}%"
        f" ({row['top1'] - teacher_top1:+.2f}) mse {row['feature_mse']:.5f}"
    )


if __name__ == "__main__":
    main()
