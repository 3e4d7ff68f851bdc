"""How long the greedy row order takes, beside the plain loop, LAPACK and one matrix product.

On random rows of the sizes of ViT-g's and EVA-CLIP-E's first MLP weights, Gaussian and Gaussian each
scaled by U(0, 1), each selecting as many rows as there are columns:

- plain: subtracts its projection on the taken row from every residual; 40 of its steps, extrapolated
  (each costs the same). "in place" does it without the temporary matrix of projections;
- LAPACK: ``scipy.linalg.qr(weight.T, pivoting=True, mode="r")``;
- ours: ``dgmr.prune.gram_schmidt``;
- floor: one product of the weight with a square matrix, which any exact method must at least do.

Usage: python benchmarks/gram_schmidt.py [--small] [--output docs/benchmarks/gram_schmidt.json]
Seconds are medians of interleaved repeats. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scipy.linalg
import torch
from dgmr.files import write_json
from dgmr.prune.gram_schmidt import gram_schmidt_order
from rich.console import Console
from rich.table import Table
from torch import Tensor

SIZES = [(6144, 1408), (15360, 1792)]
SMALL = [(1024, 256)]
STEPS = 40
# LAPACK has no rule for ties and keeps its norms by another formula, so late picks may differ.
LEADING = 64


def main() -> None:
    """Measure, print a table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a size that takes seconds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the result as JSON, too")
    options = parser.parse_args()
    result = about(measure(SMALL if options.small else SIZES, options.repeats), options.repeats)
    show(result["rows"])
    if options.output:
        write_json(options.output, result)
    print(json.dumps(result))


def about(rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    """The rows, and where they were measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "repeats": repeats,
        "rows": rows,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    Console(width=120).print(_table(rows))


def measure(sizes: Sequence[tuple[int, int]], repeats: int) -> list[dict[str, Any]]:
    """Median seconds, a row for each size, kind of rows and dtype."""
    found = []
    for height, width in sizes:
        for kind in ("Gaussian", "scaled"):
            for dtype in (torch.float64, torch.float32):
                weight = _weight(height, width, kind).to(dtype)
                seconds, equal = _medians(weight, repeats)
                found.append(
                    {
                        "size": [height, width],
                        "rows": kind,
                        "dtype": str(dtype).removeprefix("torch."),
                        "seconds": seconds,
                        "over_ours": {
                            name: seconds[name] / seconds["ours"]
                            for name in seconds
                            if name != "ours"
                        },
                        "picks_equal_to_lapack": equal,
                    }
                )
    return found


def _weight(height: int, width: int, kind: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(height, width, dtype=torch.double, generator=draw)
    if kind == "scaled":
        weight *= torch.rand(height, 1, dtype=torch.double, generator=draw)
    return weight


def _medians(weight: Tensor, repeats: int) -> tuple[dict[str, float], int]:
    """Seconds by method, and how many leading picks are LAPACK's."""
    width = weight.shape[1]
    square = weight[:width].clone()
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, (function, times) in {
            "plain": (lambda: _plain(weight.clone(), in_place=False), width / STEPS),
            "plain_in_place": (lambda: _plain(weight.clone(), in_place=True), width / STEPS),
            "floor": (lambda: _timed(lambda: weight @ square)[0], 1),
        }.items():
            seconds.setdefault(name, []).append(function() * times)
        elapsed, (_, pivots) = _timed(
            lambda: scipy.linalg.qr(weight.numpy().T, pivoting=True, mode="r")
        )
        seconds.setdefault("lapack", []).append(elapsed)
        elapsed, order = _timed(lambda: gram_schmidt_order(weight, width, dtype=weight.dtype))
        seconds.setdefault("ours", []).append(elapsed)
    differ = (order != torch.from_numpy(pivots[:width])).nonzero()
    equal = int(differ[0]) if len(differ) else width
    if equal < LEADING:
        raise RuntimeError(f"pick {equal} of {list(weight.shape)} {weight.dtype} is not LAPACK's")
    return {name: statistics.median(times) for name, times in seconds.items()}, equal


def _plain(residuals: Tensor, in_place: bool) -> float:
    """Seconds of ``STEPS`` steps of the plain loop."""

    def steps() -> None:
        for _ in range(STEPS):
            norms = residuals.norm(dim=1)
            best = int(norms.argmax())
            direction = residuals[best] / norms[best]
            projections = residuals @ direction
            if in_place:
                residuals.addr_(projections, direction, alpha=-1)
            else:
                residuals.sub_(torch.outer(projections, direction))

    return _timed(steps)[0]


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _table(rows: list[dict[str, Any]]) -> Table:
    names = ["plain", "plain_in_place", "lapack", "floor"]
    table = Table("size", "rows", "dtype", "ours s", title="Seconds (times ours)")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("picks as LAPACK", justify="right")
    for row in rows:
        cells = [f"{row['seconds'][name]:.2f} ({row['over_ours'][name]:.2g}x)" for name in names]
        table.add_row(
            "x".join(map(str, row["size"])),
            row["rows"],
            row["dtype"],
            f"{row['seconds']['ours']:.2f}",
            *cells,
            f"{row['picks_equal_to_lapack']} of {row['size'][1]}",
        )
    return table


if __name__ == "__main__":
    main()
