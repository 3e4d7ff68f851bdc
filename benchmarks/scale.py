"""The prune room at the size of EVA-CLIP-E on this machine: seconds and memory of every step.

Makes a sharded checkpoint of the whole tower (8.7 GB of bfloat16, iid Gaussian weights, for which
Gram-Schmidt takes longest), brings it in as a teacher and runs each step as the rules do, as a process
of its own whose peak resident memory is read when it ends. Some of the 64 blocks are ordered, the
tower is extrapolated from them. Needs 25 GB of disk, all given back, and the data room.
``make bench-scale`` runs it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

EVA_CLIP_E = "eva02_enormous_patch14_clip_224"
CALIBRATION_IMAGES = 4


def make_checkpoint(folder: Path, architecture: str) -> None:
    """Write ``architecture`` with random weights as ``folder``: config.json, shards and their index."""
    import timm
    import torch
    from dgmr import weights
    from timm.models._hub import save_config_for_hf

    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = timm.create_model(architecture)
    save_config_for_hf(model, str(folder / "config.json"))
    layout = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    shard_size = sum(tensor.numel() for tensor in layout.values()) // 4
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in layout.items():
        if sum(t.numel() for t in shards[-1].values()) > shard_size:
            shards.append({})
        shards[-1][name] = tensor
    generator = torch.Generator().manual_seed(0)
    index = {}
    for number, part in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        drawn = (
            (name, (torch.randn(t.shape, generator=generator) * 0.02).bfloat16())
            for name, t in part.items()
        )
        weights.write(folder / file, part, drawn)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def make_features(teacher: Path, block: str, tokens: int, folder: Path) -> None:
    """A features room with calibration inputs of one block, as the Gram matrix's cost needs them."""
    import torch
    from dgmr import artefact
    from dgmr.features.publish import publish
    from dgmr.files import ORIGIN
    from dgmr.mlps import mlps
    from dgmr.params import Features
    from dgmr.weights import Rows

    origin = {"teacher_sha256": artefact.provenance(teacher)["sha256"]}
    calibration = folder / "calibration"
    calibration.mkdir(parents=True)
    dim = mlps(artefact.skeleton(teacher))[block].in_features
    shape = [tokens // 256, 256, dim]
    layout = {"inputs": torch.empty(shape, device="meta")}
    rows = Rows(calibration / f"{block}.safetensors", layout, {ORIGIN: json.dumps(origin)})
    rows.add({"inputs": torch.randn(shape, generator=torch.Generator().manual_seed(1))})
    rows.close()
    publish(teacher, [], calibration, Features(), folder / "room")


def run(*arguments: object) -> dict[str, float]:
    """Seconds and peak resident memory, in GB, of ``python`` with these arguments.

    A small process starts it and waits for it, for a child's peak begins at what its parent holds.
    """
    command = [sys.executable, __file__, "--run", *map(str, arguments)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said)


def run_here(arguments: list[str]) -> None:
    """As :func:`run`, printed as JSON."""
    started = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], **quiet)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed: run it by hand")
    seconds = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "peak_gb": usage.ru_maxrss * 1024 / 1e9}))


def measure(
    data: Path,
    architecture: str = EVA_CLIP_E,
    blocks: int = 64,
    ordered: int = 4,
    tokens: int = 32768,
) -> dict[str, Any]:
    """All figures.

    ``ordered`` of the ``blocks`` are really ordered by Gram-Schmidt; one by ``output_gram_schmidt``,
    whose Gram matrix is made of ``tokens``.
    """
    dgmr = ("-m", "dgmr")
    Path("work").mkdir(exist_ok=True)
    with TemporaryDirectory(dir="work") as name:
        folder = Path(name)
        checkpoint, teacher = folder / "checkpoint", folder / "teacher"
        steps = {"import torch and timm": run("-c", "import timm, torch")}
        steps["make"] = run(__file__, "--make", checkpoint, "--model", architecture)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        config = json.dumps({"model": f"local-dir:{checkpoint}"})
        steps["teacher"] = run(*dgmr, "teacher", "convert", "--config", config, "--output", teacher)

        def order(method: str, part: int, parts: int, *options: object) -> dict[str, float]:
            config = json.dumps({"method": method, "max_ratio": 1.0, "parts": parts})
            command = ("prune", "orders", "--teacher", teacher, "--config", config)
            output = folder / method
            return run(*dgmr, *command, "--part", part, "--output", output, *options)

        steps["order one block"] = order("gram_schmidt", 0, blocks)
        parts = blocks // ordered
        steps[f"order {ordered} blocks"] = order("gram_schmidt", 1, parts)
        part = json.loads((folder / "gram_schmidt" / f"part-1-of-{parts}.json").read_text())
        selecting = part["seconds"]
        steps["features of one block"] = run(
            __file__, "--features", teacher, "blocks.0.mlp", tokens, folder / "features"
        )
        steps["order one block, output_gram_schmidt"] = order(
            "output_gram_schmidt", 0, blocks, "--features", folder / "features" / "room"
        )
        calibration = json.dumps({"calibration": {"samples": CALIBRATION_IMAGES}, "batch_size": 2})
        steps[f"calibration, {CALIBRATION_IMAGES} images"] = run(
            *dgmr, "features", "calibration", "--teacher", teacher, "--data", data,
            "--config", calibration, "--output", folder / "calibration",
        )  # fmt: skip
        order("random", 0, 1)
        steps["assemble"] = run(
            *dgmr, "prune", "assemble", "--teacher", teacher, "--orders", folder / "random",
            "--config", json.dumps({"ratio": 1.0, "compensate": "none"}),
            "--output", folder / "student",
        )  # fmt: skip
    four = steps[f"order {ordered} blocks"]["seconds"]
    outside = four - selecting
    tower = outside + blocks * selecting / ordered
    return {
        "checkpoint_gb": size / 1e9,
        "steps": steps,
        "block_selection_seconds": selecting / ordered,
        "tower_minutes": tower / 60,
        "tower_selection_share": 1 - outside / tower,
    }


def show(found: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"checkpoint of {found['checkpoint_gb']:.2f} GB")
    for step, cost in found["steps"].items():
        print(f"{step:40} {cost['seconds']:8.1f} s {cost['peak_gb']:6.2f} GB")
    for figure in ("block_selection_seconds", "tower_minutes", "tower_selection_share"):
        print(f"{figure:40} {found[figure]:8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, help="only make the checkpoint in this folder")
    parser.add_argument("--model", default=EVA_CLIP_E, help="timm architecture")
    parser.add_argument("--features", nargs=4, help="only make: teacher, block, tokens, folder")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="only run python with this")
    parser.add_argument("--data", type=Path, default=Path("results/data"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/scale.json"))
    options = parser.parse_args()
    if options.run:
        run_here(options.run)
    elif options.make:
        make_checkpoint(options.make, options.model)
    elif options.features:
        teacher, block, tokens, folder = options.features
        make_features(Path(teacher), block, int(tokens), Path(folder))
    else:
        found = measure(options.data)
        show(found)
        options.output.write_text(json.dumps(found, indent=2) + "\n")
