"""Every method of selection with every compensation on the demo teacher, right after pruning.

What the tables in docs/benchmarks.md show: feature MSE and top-1 on evaluation images, none of which
was used for calibration, by method, compensation and width ratio; and how both depend on the number
of calibration images. Needs the data room (``snakemake data evaluation_data``); works in a folder of its own and
writes JSON. ``make bench-methods`` runs it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from dgmr import artefact
from dgmr.features import calibration
from dgmr.features.publish import publish
from dgmr.files import write_json
from dgmr.mlps import mlps
from dgmr.models import evaluation_transform, outputs_and_logits
from dgmr.params import Features, Prune, Teacher
from dgmr.prune import greedy, orders, refits, saliency
from dgmr.prune.assemble import assemble
from dgmr.prune.block import Block
from dgmr.prune.methods import METHODS, Request
from dgmr.shards import ShardedImages
from dgmr.targets import Manifest
from dgmr.teacher.convert import convert
from rich.console import Console
from rich.progress import track
from rich.table import Table

TEACHER = "local-dir:resources/teachers/fashion-vit"
DATA = Path("results/data")
RATIOS = (2.0, 1.0, 0.5, 0.25, 0.125)
COMPENSATIONS = ("none", "least_squares", "sequential")
CALIBRATION_IMAGES = (64, 256, 1024, 2048, 8192)
GRAM_TOKENS = (1024, 4096, 16384, None)


class Bench:
    """The teacher, its calibration inputs, and what it says of the evaluation images."""

    def __init__(self, folder: Path, images: int, evaluated: int):
        self.folder = folder
        self.teacher = folder / "teacher"
        convert(Teacher(model=TEACHER), self.teacher)
        self.features = self.calibrated(images)
        model = artefact.load(self.teacher)
        shown = ShardedImages(DATA / "eval")
        transform = evaluation_transform(model)
        step = len(shown) // evaluated
        chosen = range(0, step * evaluated, step)
        self.images = torch.stack([transform(shown.image(index)) for index in chosen])
        self.labels = torch.tensor([shown.labels[index] for index in chosen])
        self.wanted, self.teacher_top1 = self.said(model)

    def calibrated(self, images: int) -> "Calibrated":
        """The calibration inputs for the first ``images`` training images."""
        config = Features.model_validate({"calibration": {"samples": images}})
        folder = self.folder / f"features-{images}"
        calibration.compute(self.teacher, DATA, config, folder / "calibration")
        publish(self.teacher, [], folder / "calibration", config, folder / "room")
        return Calibrated(folder, config)

    @torch.inference_mode()
    def said(self, model) -> tuple[list[torch.Tensor], float]:
        """Features of all evaluation images, pooled and patch tokens, and top-1 in percent."""
        answers = [outputs_and_logits(model, batch) for batch in self.images.split(250)]
        logits = torch.cat([logits for _, logits in answers])
        features = [torch.cat(parts) for parts in zip(*(said for said, _ in answers), strict=True)]
        return features, 100 * (logits.argmax(1) == self.labels).double().mean().item()

    def scores(self, model: Path) -> dict[str, float]:
        """Feature MSE, the sum over pooled output and patch tokens, and top-1 of an artefact."""
        said, top1 = self.said(artefact.load(model))
        mse = sum((a - b).square().mean().item() for a, b in zip(said, self.wanted, strict=True))
        return {"feature_mse": mse, "top1": top1}

    def order(self, method: str, features: "Calibrated", tokens: int | None = 32768) -> Path:
        """The orders of all blocks by ``method``, reaching as far as the largest ratio."""
        folder = features.folder / f"{method}-{tokens}"
        scores = features.folder / "saliency"
        if method == "taylor":
            saliency.compute(self.teacher, DATA, features.config, 0, scores)
        config = Prune(method=method, ratio=max(RATIOS), tokens=tokens)
        orders.compute(self.teacher, config, 0, folder, features.folder / "room", scores)
        return folder

    def pruned(
        self, method: str, ratio: float, compensation: str, features: "Calibrated", order: Path
    ) -> dict:
        """Feature MSE (the sum over pooled output and patch tokens) and top-1 of the pruned student."""
        config = Prune(
            method=method,
            ratio=ratio,
            compensate="none" if compensation == "none" else "least_squares",
            sequential=compensation == "sequential",
        )
        with TemporaryDirectory(dir=self.folder) as name:
            out = Path(name, "out")
            self.assembled(config, features, order, out)
            blocks = json.loads((out / "blocks.json").read_text())
            scores = self.scores(out)
        return {
            "method": method,
            "ratio": ratio,
            "compensation": compensation,
            "images": features.config.calibration.samples,
            **scores,
            "block_errors": [block.get("error_refit") for block in blocks.values()],
        }

    def assembled(self, config: Prune, features: "Calibrated", order: Path, output: Path) -> None:
        """Write the pruned student as the prune room does."""
        with TemporaryDirectory(dir=self.folder) as name:
            work = Path(name)
            if config.sequential:
                refits.compute_sequential(self.teacher, order, DATA, features.config, config, work)
            elif config.compensate == "least_squares":
                refits.compute(self.teacher, order, features.folder / "room", config, 0, work)
            assemble(self.teacher, order, sorted(work.glob("part-*.json")), config, output)

    def in_blocks(self, method: str) -> float:
        """The least variance that picking in blocks explains over picking one by one, by any width."""
        least = 1.0
        manifest = Manifest(self.features.folder / "room")
        for name, mlp in mlps(artefact.skeleton(self.teacher)).items():
            block = Block(self.teacher, name, mlp, manifest)
            request = Request(int(max(RATIOS) * mlp.in_features))
            blocked = METHODS[method](block, request).gains.cumsum(0)
            with patch.multiple(greedy, POOL=mlp.hidden_features, BLOCK=mlp.hidden_features):
                exact = METHODS[method](block, request).gains.cumsum(0)
            least = min(least, float((blocked / exact).min()))
        return least


class Calibrated:
    """Calibration inputs and the section of params that made them."""

    def __init__(self, folder: Path, config: Features):
        self.folder, self.config = folder, config


def measure(
    images: int = 2048,
    evaluated: int = 4000,
    methods: Sequence[str] = tuple(METHODS),
    compensations: Sequence[str] = COMPENSATIONS,
    sweep: bool = True,
) -> dict:
    """All figures; ``images`` for calibration, ``evaluated`` of the evaluation images."""
    with TemporaryDirectory() as name:
        bench = Bench(Path(name), images, evaluated)
        rows = []
        for method in track(methods, "methods"):
            order = bench.order(method, bench.features)
            rows += [
                bench.pruned(method, ratio, compensation, bench.features, order)
                for ratio in RATIOS
                for compensation in compensations
            ]
        swept = []
        for count in track(CALIBRATION_IMAGES if sweep else (), "calibration images"):
            features = bench.calibrated(count)
            for method in ("active_energy", "output_gram_schmidt"):
                order = bench.order(method, features)
                swept += [
                    bench.pruned(method, ratio, "least_squares", features, order)
                    for ratio in (1.0, 0.25)
                ]
        sampled = []
        for tokens in GRAM_TOKENS if sweep else ():
            order = bench.order("output_gram_schmidt", bench.features, tokens)
            for ratio in (1.0, 0.25):
                row = bench.pruned(
                    "output_gram_schmidt", ratio, "least_squares", bench.features, order
                )
                sampled.append(row | {"tokens": tokens})
        return {
            "calibration_images": images,
            "evaluation_images": evaluated,
            "teacher_top1": bench.teacher_top1,
            "rows": rows,
            "calibration_sweep": swept,
            "token_sweep": sampled,
            "explained_in_blocks": bench.in_blocks("output_gram_schmidt"),
        }


def worst_ratio(found: dict) -> float:
    """Largest feature MSE of output_gram_schmidt over that of active_energy, both refitted."""
    mse = {
        (row["method"], row["ratio"]): row["feature_mse"]
        for row in found["rows"]
        if row["compensation"] == "least_squares"
    }
    return max(mse["output_gram_schmidt", ratio] / mse["active_energy", ratio] for ratio in RATIOS)


def show(found: dict) -> None:
    """Print the tables."""
    console = Console(width=140)
    table = Table(title="Feature MSE / top-1 right after pruning, by width ratio")
    for column in ("method", "compensation", *map(str, RATIOS)):
        table.add_column(column, justify="left" if column[0].isalpha() else "right")
    cells = {(r["method"], r["compensation"], r["ratio"]): r for r in found["rows"]}
    for method in dict.fromkeys(row["method"] for row in found["rows"]):
        for compensation in COMPENSATIONS:
            rows = [cells[method, compensation, ratio] for ratio in RATIOS]
            shown = [f"{row['feature_mse']:.4f} / {row['top1']:.1f}" for row in rows]
            table.add_row(method, compensation, *shown)
    console.print(table)
    for row in found["calibration_sweep"]:
        console.print(
            f"{row['images']:5} images, {row['method']}, r={row['ratio']}:"
            f" {row['feature_mse']:.4f} / {row['top1']:.1f}"
        )
    for row in found["token_sweep"]:
        console.print(
            f"{row['tokens']} tokens for the Gram matrix, r={row['ratio']}:"
            f" {row['feature_mse']:.4f} / {row['top1']:.1f}"
        )
    console.print(
        f"picked in blocks: {found['explained_in_blocks']:.5f} of the variance one by one"
    )
    console.print(f"teacher top-1 {found['teacher_top1']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/methods.json"))
    parser.add_argument("--quick", action="store_true", help="fewer images, no sweep")
    options = parser.parse_args()
    started = time.monotonic()
    found = measure(512, 1000, sweep=False) if options.quick else measure()
    show(found)
    print(f"output_gram_schmidt over active_energy, refitted, worst: {worst_ratio(found):.3f}")
    print(f"{time.monotonic() - started:.0f} s")
    if not options.quick:
        write_json(options.output, found)
