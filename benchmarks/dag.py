"""What planning costs at the size of the paper's runs: seconds and memory of a dry run.

1,200 shards, ten a job in the data and features rooms as is the default, or each a job of its own, the blocks of
a 64-block tower a job each in the prune room, four stages. Nothing is there yet, so every job is planned.
``make bench-dag`` runs it; its last line is one JSON object.
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
        "eval": {"source": "imagefolder", "path": "/data/imagenet/val"},
    },
    "prune": {"ratio": 1.0, "parts": BLOCKS},
    "distill": {"stages": {f"stage{number}": STAGE for number in range(STAGES)}},
}


def plan(params: dict) -> dict:
    """Seconds and memory of a dry run, Python's start included."""
    with TemporaryDirectory() as name:
        Path(name, "params.yaml").write_text(yaml.safe_dump(params))
        snakefile = Path("Snakefile").absolute()
        command = ("-m", "snakemake", "--snakefile", snakefile, "--directory", name, "--cores", 2)
        return scale.run(*command, "--dry-run", "--quiet")


def main() -> None:
    """Measure, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/dag.json"))
    options = parser.parse_args()
    costs = {"": [], "_job_a_shard": []}
    for _ in range(options.repeats):
        costs[""].append(plan(PARAMS))
        costs["_job_a_shard"].append(
            plan(PARAMS | {"data": PARAMS["data"] | {"shards_per_job": 1}})
        )
    figures = {}
    for name, found in costs.items():
        figures[f"plan_seconds{name}"] = round(statistics.median(c["seconds"] for c in found), 2)
        figures[f"plan_peak_gb{name}"] = round(max(c["peak_gb"] for c in found), 3)
    options.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
