"""What the feature cache and the recipe are worth in the distillation of the demo teacher.

Speed: the same student, batch and losses with cached targets and with the teacher in every step, in
turn; how much of a cached step is neither forward, backward nor optimizer; how fast the loader alone is,
there and on real photos; bfloat16 against float32; whether memory grows with the data.

Samples: the plain recipe (Gram-Schmidt on the weights, no compensation, the paper's loss) against ours
(``output_gram_schmidt``, least squares, block targets besides), each with the best of three learning
rates at every budget, every budget a whole cosine of its own; calibration images count as samples.

Needs a finished default run (``make run``), and for the photos the variable DGMR_TEST_PHOTOS; works in a folder of its own. ``make bench-distill`` runs it;
its last line is one JSON object.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import scale
import timm
import torch
from dgmr import artefact, params
from dgmr.distill.learner import Learner
from dgmr.distill.pairs import Batches, PairOrder, Pairs
from dgmr.distill.trainer import train
from dgmr.features import targets
from dgmr.features.publish import publish
from dgmr.files import read_json, write_json
from dgmr.params import Features, Prune, Running, Stage
from dgmr.shards import MANIFEST, Sample, write_manifest, write_shard
from dgmr.targets import Manifest
from dgmr.views import ViewTransform
from methods import DATA, Bench
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

RESULTS = Path("results")
PHOTOS = os.environ.get("DGMR_TEST_PHOTOS")
WARM_STEPS = 20
PRECISION_SAMPLES = 20_000
# Of each width ratio: feature MSEs to reach, all below what the refit alone gives, and the learning
# rates of both recipes.
GOALS = {0.25: (0.20, 0.17, 0.14, 0.12), 0.125: (0.35, 0.30, 0.25, 0.22)}
PLAIN_LRS = {0.25: (1.5e-3, 3e-3, 6e-3), 0.125: (1.5e-3, 3e-3, 6e-3)}
OUR_LRS = {0.25: (2.5e-3, 4e-3, 8e-3), 0.125: (4e-3, 8e-3, 1.2e-2)}
PLAIN_BUDGETS = {
    0.25: (3200, 6400, 12800, 25600, 51200, 102400),
    0.125: (3200, 6400, 12800, 25600, 51200),
}
OUR_BUDGETS = dict.fromkeys(GOALS, (1600, 3200, 6400, 12800))
OUR_CALIBRATION = {0.25: 1024, 0.125: 512}
# Of AdamW, in both recipes.
BETAS = {0.25: (0.9, 0.999), 0.125: (0.8, 0.99)}
# All blocks but the last, whose output the final norm scales down.
BLOCKS = (0, 1, 2, 3, 4)


class Clock:
    """A training loop's seconds: in all, and in the passes and the optimizer; losses by step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.inside: list[float] = []
        self.losses: list[float] = []

    @contextmanager
    def watching(self) -> Iterator["Clock"]:
        """Within the block the trainer's steps are timed."""
        measure, update, normalised = Learner.measure, Learner.update, ViewTransform.normalised

        def timed_measure(learner: Learner, *arguments: Any) -> Any:
            started = time.perf_counter()
            self.inside.append(0.0)
            found = measure(learner, *arguments)
            self.inside[-1] += time.perf_counter() - started
            self.losses.append(found.values["loss"])
            return found

        def timed_update(learner: Learner, *arguments: Any) -> None:
            started = time.perf_counter()
            update(learner, *arguments)
            self.ends.append(time.perf_counter())
            self.inside[-1] += self.ends[-1] - started

        def timed_normalised(transform: ViewTransform, pixels: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            found = normalised(transform, pixels)
            self.inside[-1] -= time.perf_counter() - started
            return found

        with (
            patch.object(Learner, "measure", timed_measure),
            patch.object(Learner, "update", timed_update),
            patch.object(ViewTransform, "normalised", timed_normalised),
        ):
            yield self

    def images_per_s(self, batch_size: int) -> float:
        """From the first warm step on."""
        return batch_size * (len(self.ends) - WARM_STEPS) / self._seconds

    @property
    def overhead(self) -> float:
        """Part of the time that is neither forward, backward nor optimizer."""
        return 1 - sum(self.inside[WARM_STEPS:]) / self._seconds

    @property
    def _seconds(self) -> float:
        return self.ends[-1] - self.ends[WARM_STEPS - 1]


def speed(folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Cached, online and bfloat16 training in turn, of the default run's pruned student."""
    online = folder / "online"
    _with(RESULTS / "features", online, {"config": {"cache": "none"}, "targets": {}})
    base = params.read(Path("params.yaml")).distill.stages["all"]
    stage = base.model_copy(update={"samples": steps * base.batch_size})
    half = stage.model_copy(update={"precision": "bfloat16"})
    ways = {
        "cached": (RESULTS / "features", stage),
        "online": (online, stage),
        "bfloat16": (RESULTS / "features", half),
    }
    clocks: dict[str, list[Clock]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, (features, config) in ways.items():
            with Clock().watching() as clock:
                _trained(folder / f"{name}-{repeat}", RESULTS / "prune", features, config)
            clocks[name].append(clock)
    size = base.batch_size
    found: dict[str, Any] = {
        name: statistics.median(clock.images_per_s(size) for clock in timed)
        for name, timed in clocks.items()
    }
    pairs = zip(clocks["cached"][0].losses, clocks["online"][0].losses, strict=True)
    found["largest_loss_difference"] = max(abs(a / b - 1) for a, b in list(pairs)[:100])
    found["overhead_fraction"] = statistics.median(clock.overhead for clock in clocks["cached"])
    student = artefact.load(RESULTS / "prune")
    rates = [loader_alone(DATA, RESULTS / "features", student, size, steps) for _ in range(repeats)]
    found["loader"] = statistics.median(rates)
    return found


def loader_alone(
    data: Path, features: Path, student: torch.nn.Module, batch_size: int, steps: int
) -> float:
    """Images a second that the loader gives where nothing is done with them."""
    pairs = Pairs(data, features, student, verify=False)
    views = Manifest(features).config.views.count
    order = PairOrder(len(pairs.images), views, 0)
    batches = Batches(order, batch_size, range(steps))
    loader = DataLoader(pairs, batch_size=None, sampler=batches, num_workers=0)
    started = time.perf_counter()
    for batch in loader:
        pairs.transform.normalised(batch.pixels)
    return batch_size * steps / (time.perf_counter() - started)


def photos(folder: Path, steps: int, batch_size: int = 16) -> dict[str, float] | None:
    """The loader and the training of a ViT-Ti on real photos at 224 pixels, where there are any."""
    files = sorted(Path(PHOTOS).glob("*.JPEG"))[: 8 * batch_size] if PHOTOS else []
    if len(files) < 2 * batch_size:
        print("no photos: DGMR_TEST_PHOTOS names no folder of *.JPEG", flush=True)
        return None
    model = timm.create_model("vit_tiny_patch16_224").eval()
    artefact.save(folder / "teacher", model, {"stage": "teacher"})
    data = folder / "data"
    data.mkdir()
    samples = (Sample(f"photo-{i}", f.read_bytes(), "jpg") for i, f in enumerate(files))
    write_manifest(data, [write_shard(data, "00000", samples)])
    found = {}
    for name, pixels in (("pixels_cached", True), ("decoded", False)):
        config = Features(pixels=pixels, batch_size=batch_size, calibration={"samples": 1})
        work = folder / name
        targets.compute(folder / "teacher", data, ["00000"], config, work / "targets")
        publish(folder / "teacher", [work / "targets"], work / "none", config, work / "room")
        found[name] = loader_alone(data, work / "room", model, batch_size, steps)
    stage = Stage(train="all", samples=steps * batch_size, batch_size=batch_size, lr=1e-4)
    with Clock().watching() as clock:
        train(
            "photos", folder / "teacher", folder / "teacher", data,
            folder / "pixels_cached/room", stage, folder / "out", folder / "runs",
        )  # fmt: skip
    seconds = (clock.ends[-1] - clock.ends[1]) / (len(clock.ends) - 2)
    return found | {"training": batch_size / seconds}


def memory(folder: Path, samples: int) -> dict[str, float]:
    """Peak memory, GB, of a stage on one shard of the data room and on all; the same steps."""
    content = read_json(DATA / MANIFEST)
    small = {"shards": content["shards"][:1], "samples": content["shards"][0]["samples"]}
    few = folder / "few-data"
    _with(DATA, few, small)
    for suffix in ("tar", "parquet"):
        file = f"{small['shards'][0]['name']}.{suffix}"
        (few / file).symlink_to((DATA / file).absolute())
    listed = read_json(RESULTS / "features" / MANIFEST)["targets"]
    first = {n: e for n, e in listed.items() if n.startswith(small["shards"][0]["name"])}
    _with(RESULTS / "features", folder / "few-features", {"targets": first})
    stage = Stage(train="all", samples=samples, lr=1e-4).model_dump_json()
    found = {}
    rooms = {
        str(small["samples"]): (few, folder / "few-features"),
        str(content["samples"]): (DATA, RESULTS / "features"),
    }
    for name, (data, features) in rooms.items():
        found[name] = scale.run(
            "-m", "dgmr", "distill", "train", "--stage", "memory", "--parent", RESULTS / "prune",
            "--teacher", RESULTS / "teacher", "--data", data, "--features", features,
            "--config", stage, "--output", folder / f"memory-{name}", "--runs", folder / "runs",
        )["peak_gb"]  # fmt: skip
    return found


def bfloat16_accuracy(folder: Path, bench: Bench) -> dict[str, Any]:
    """Where the default run's last stage ends in either precision, given fewer samples."""
    stage = params.read(Path("params.yaml")).distill.stages["all"]
    found = {}
    for precision in ("float32", "bfloat16"):
        changes = {"precision": precision, "samples": PRECISION_SAMPLES}
        config = stage.model_copy(update=changes)
        out = _trained(folder / precision, RESULTS / "distill/mlp", RESULTS / "features", config)
        found[precision] = bench.scores(out)
    return found


def samples(folder: Path, bench: Bench, widths: list[float]) -> list[dict[str, Any]]:
    """Feature MSE and top-1 by recipe, width ratio, samples and learning rate."""
    config = params.read(Path("params.yaml")).features
    asked = config.model_copy(update={"blocks": BLOCKS})
    shards = [shard["name"] for shard in read_json(DATA / MANIFEST)["shards"]]
    targets.compute(RESULTS / "teacher", DATA, shards, asked, folder / "targets")
    publish(RESULTS / "teacher", [folder / "targets"], folder / "none", asked, folder / "room")
    recipes = {
        "plain": ("gram_schmidt", "none", {"blocks": 0.0}, PLAIN_BUDGETS, PLAIN_LRS),
        "ours": ("output_gram_schmidt", "least_squares", {"blocks": 1.0}, OUR_BUDGETS, OUR_LRS),
    }
    rows = []
    for ratio in widths:
        calibrated = bench.calibrated(OUR_CALIBRATION[ratio])
        for recipe, (method, compensate, loss, budgets, lrs) in recipes.items():
            order = bench.order(method, calibrated, None)
            counted = 0 if compensate == "none" else OUR_CALIBRATION[ratio]
            start = folder / f"{recipe}-{ratio}"
            chosen = Prune(method=method, ratio=ratio, compensate=compensate)
            bench.assembled(chosen, calibrated, order, start)
            about = {"recipe": recipe, "ratio": ratio}
            rows.append(about | {"samples": counted, "lr": None} | bench.scores(start))
            print(rows[-1], flush=True)
            for budget, lr in itertools.product(budgets[ratio], lrs[ratio]):
                schedule = {"samples": budget, "lr": lr, "min_lr": lr / 100, "betas": BETAS[ratio]}
                stage = Stage(train="all", loss=loss, **schedule)
                place = folder / f"{recipe}-{ratio}-{budget}-{lr}"
                out = _trained(place, start, folder / "room", stage)
                found = {"samples": budget + counted, "lr": lr} | bench.scores(out)
                rows.append(about | found)
                print(rows[-1], flush=True)
    return rows


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """By width ratio and feature MSE to reach: samples of the plain recipe over ours.

    None where one of them does not reach it within its budgets, or the refit alone does.
    """
    found: dict[str, dict[str, float | None]] = {}
    for ratio, goals in GOALS.items():
        found[str(ratio)] = {}
        for goal in goals:
            needed = [_needed(_best(rows, name, ratio), goal) for name in ("plain", "ours")]
            plain, ours = needed
            found[str(ratio)][str(goal)] = plain / ours if plain and ours else None
    return found


def _best(rows: list[dict[str, Any]], recipe: str, ratio: float) -> list[dict[str, Any]]:
    """The best learning rate's row of every budget, the untrained student's first."""
    of_one = [row for row in rows if (row["recipe"], row["ratio"]) == (recipe, ratio)]
    budgets = sorted({row["samples"] for row in of_one if row["lr"] is not None})
    first = next(row for row in of_one if row["lr"] is None)
    trained = [row for row in of_one if row["lr"] is not None]
    return [first] + [
        min((r for r in trained if r["samples"] == budget), key=lambda r: r["feature_mse"])
        for budget in budgets
    ]


def _needed(best: list[dict[str, Any]], goal: float) -> float | None:
    """Samples at which the feature MSE reaches ``goal``: a line between budgets, both in logarithms."""
    trained = best[1:]
    if best[0]["feature_mse"] <= goal or trained[0]["feature_mse"] <= goal:
        # Before the first budget: no more than that is known.
        return float(trained[0]["samples"]) if best[0]["feature_mse"] > goal else None
    for before, after in zip(trained, trained[1:], strict=False):
        if after["feature_mse"] <= goal:
            part = math.log(before["feature_mse"] / goal) / math.log(
                before["feature_mse"] / after["feature_mse"]
            )
            return float(before["samples"] * (after["samples"] / before["samples"]) ** part)
    return None


def _with(room: Path, output: Path, changes: dict[str, Any]) -> None:
    """Another manifest of the same files."""
    content = read_json(room / MANIFEST)
    for name, value in changes.items():
        merged = {**content[name], **value} if name == "config" else value
        content[name] = merged
    write_json(output / MANIFEST, content)


def _trained(folder: Path, parent: Path, features: Path, stage: Stage) -> Path:
    runs, running = folder / "runs", Running(checkpoint_every_s=3600)
    train(
        "bench", parent, RESULTS / "teacher", DATA, features, stage, folder / "out", runs, running
    )
    return folder / "out"


def show(found: dict[str, Any]) -> None:
    """Print the table of samples."""
    console = Console(width=120)
    for ratio in GOALS:
        table = Table(title=f"feature MSE / top-1 (best learning rate) at r = {ratio}")
        for column in ("recipe", "samples", "lr", "feature MSE", "top-1"):
            table.add_column(column, justify="right")
        for recipe in ("plain", "ours"):
            for row in _best(found["samples"], recipe, ratio):
                lr = "" if row["lr"] is None else f"{row['lr']:g}"
                cells = (f"{row['samples']:,}", lr, f"{row['feature_mse']:.4f}")
                table.add_row(recipe, *cells, f"{row['top1']:.2f}")
        console.print(table)
    console.print(found["samples_plain_over_ours"])


def main() -> None:
    """Measure all, write it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120, help="steps of a timed training")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=list(GOALS), help="of the samples"
    )
    parser.add_argument("--only", choices=("speed", "samples"), help="keep the rest of the output")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/distill.json"))
    options = parser.parse_args()
    with TemporaryDirectory(dir="work") as name:
        folder = Path(name)
        found: dict[str, Any] = read_json(options.output) if options.only else {}
        found |= {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }
        bench = Bench(folder / "bench", 8, 10_000)
        if options.only != "samples":
            found |= {
                "speed": speed(folder, options.steps, options.repeats),
                "photos": photos(folder / "photos", options.steps // 10),
                "memory": memory(folder, 6400),
                "precision": bfloat16_accuracy(folder, bench),
            }
        if options.only != "speed":
            found["teacher_top1"] = bench.teacher_top1
            kept = [row for row in found.get("samples", []) if row["ratio"] not in options.ratios]
            found["samples"] = kept + samples(folder, bench, options.ratios)
            found["samples_plain_over_ours"] = ratios(found["samples"])
        show(found)
        write_json(options.output, found)
    measured = found["speed"]
    figures = {
        "cached_vs_online": measured["cached"] / measured["online"],
        "samples_plain_over_ours": found["samples_plain_over_ours"],
        "overhead_fraction": measured["overhead_fraction"],
        "loader_over_train": measured["loader"] / measured["cached"],
        "bf16_over_fp32": measured["bfloat16"] / measured["cached"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
