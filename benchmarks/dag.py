"""What planning costs at the size of the paper's runs: seconds and memory of a dry run.

1,200 shards, each a job of its own in the data and features rooms, the blocks of a 64-block tower a job each
in the prune room, four stages. Nothing is there yet, so every job is planned. ``make bench-dag`` runs it;
its last line is one JSON object.
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import scale
import yaml

SHARDS, BLOCKS, STAGES = 1200, 64, 4
STAGE = {"train": "all", "samples": 64000, "lr": 1e-4}
PARAMS = {
    "teacher": {"model": "eva02_enormous_patch14_clip_224.laion2b_plus"},
    "data": {
        "source": "table",
        "table": "/data/images/*.parquet",
        "n_samples": SHARDS * 1000,
        "shards_per_job": 1,
        "eval": {"source": "imagefolder", "path": "/data/imagenet/val"},
    },
    "prune": {"ratio": 1.0, "parts": BLOCKS},
    "distill": {"stages": {f"stage{number}": STAGE for number in range(STAGES)}},
}


def main() -> None:
    """Measure, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    snakefile = Path("Snakefile").absolute()
    with TemporaryDirectory() as name:
        Path(name, "params.yaml").write_text(yaml.safe_dump(PARAMS))
        command = ("-m", "snakemake", "--snakefile", snakefile, "--directory", name, "--cores", 2)
        costs = [scale.run(*command, "--dry-run", "--quiet") for _ in range(options.repeats)]
    figures = {
        "plan_seconds": round(statistics.median(cost["seconds"] for cost in costs), 2),
        "plan_peak_gb": round(max(cost["peak_gb"] for cost in costs), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
