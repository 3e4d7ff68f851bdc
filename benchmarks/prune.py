"""The figures of the prune room, in one run: ``make bench-prune``; its last line is one JSON object.

``vitg_vs_plain`` and ``evae_vs_plain``: how many times faster Gram-Schmidt is than the plain loop on
rows scaled by U(0, 1), in the default float64; ``vitg_vs_lapack``: than LAPACK's pivoted QR, the lesser
of the two kinds of rows. ``evae_peak_gb``: peak memory of ordering one block of the 8.7 GB checkpoint;
``evae_tower_minutes``: 64 such blocks, from some; ``output_evae_block_seconds``: one of them by
``output_gram_schmidt``. ``output_vs_active_energy_mse``: feature MSE on the demo teacher of
``output_gram_schmidt`` over that of ``active_energy``, both refitted, the worst of the widths.
"""

import json
from pathlib import Path

import gram_schmidt
import methods
import scale
from dgmr.files import write_json

BENCHMARKS = Path("docs/benchmarks")
REPEATS = 3


def main() -> None:
    """Measure all, write each benchmark's file, print the figures."""
    rows = gram_schmidt.measure(gram_schmidt.SIZES, REPEATS)
    write_json(BENCHMARKS / "gram_schmidt.json", gram_schmidt.about(rows, REPEATS))
    gram_schmidt.show(rows)
    ours = {
        (row["size"][0], row["rows"]): row["over_ours"] for row in rows if row["dtype"] == "float64"
    }
    big = scale.measure(Path("results/data"))
    write_json(BENCHMARKS / "scale.json", big)
    scale.show(big)
    chosen = methods.measure(
        methods=("active_energy", "output_gram_schmidt"),
        compensations=("least_squares",),
        sweep=False,
    )
    figures = {
        "vitg_vs_plain": ours[6144, "scaled"]["plain"],
        "vitg_vs_lapack": min(ours[6144, kind]["lapack"] for kind in ("Gaussian", "scaled")),
        "evae_vs_plain": ours[15360, "scaled"]["plain"],
        "evae_peak_gb": big["steps"]["order one block"]["peak_gb"],
        "evae_tower_minutes": big["tower_minutes"],
        "output_vs_active_energy_mse": methods.worst_ratio(chosen),
        "output_evae_block_seconds": big["steps"]["order one block, output_gram_schmidt"][
            "seconds"
        ],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
