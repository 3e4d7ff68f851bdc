"""What the prune room holds of a checkpoint, at a small size; make test-prune does it at full size."""

import json
import sys
from pathlib import Path

import pytest
import tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import scale

WHOLE = 0.6  # GB of a ViT-L in bfloat16; 1.2 in float32


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    """Memory beyond the imports, in GB, by step; steps are processes, as the rules start them."""
    folder = tmp_path_factory.mktemp("scale")
    data = tiny.write_data(folder / "data")
    checkpoint, teacher = folder / "checkpoint", folder / "teacher"
    scale.make_checkpoint(checkpoint, "vit_large_patch16_224")
    assert sum(p.stat().st_size for p in checkpoint.iterdir()) / 1e9 == pytest.approx(
        WHOLE, rel=0.05
    )
    dgmr = ("-m", "dgmr")
    config = json.dumps({"model": f"local-dir:{checkpoint}"})
    scale.run(*dgmr, "teacher", "convert", "--config", config, "--output", teacher)
    one = json.dumps({"max_ratio": 1.0, "parts": 24})
    every = json.dumps({"max_ratio": 1.0, "method": "random"})
    order = (*dgmr, "prune", "orders", "--teacher", teacher, "--part", 0)
    scale.run(*order, "--config", every, "--output", folder / "random")
    steps = {
        "imports": ("-c", "import timm, torch"),
        "order": (*order, "--config", one, "--output", folder / "orders"),
        "calibration": (
            *dgmr, "features", "calibration", "--teacher", teacher, "--data", data,
            "--config", json.dumps({"calibration": {"samples": 2}, "batch_size": 1}),
            "--output", folder / "calibration",
        ),
        "assemble": (
            *dgmr, "prune", "assemble", "--teacher", teacher, "--orders", folder / "random",
            "--config", json.dumps({"ratio": 1.0, "compensate": "none"}),
            "--output", folder / "student",
        ),
    }  # fmt: skip
    peak = {name: scale.run(*step)["peak_gb"] for name, step in steps.items()}
    return {name: gb - peak["imports"] for name, gb in peak.items()}


def test_ordering_a_block_reads_that_block(extra):
    # 8 MB of weights, 34 in float64, as much again for coefficients.
    assert extra["order"] < 0.2 < WHOLE / 2


def test_calibration_holds_two_blocks(extra):
    assert extra["calibration"] < 0.4 < WHOLE


def test_assembly_holds_a_tensor_at_a_time(extra):
    assert extra["assemble"] < 0.2 < WHOLE / 2
