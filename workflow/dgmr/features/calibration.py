"""Inputs of every MLP for the calibration images, as the teacher sees them."""

import json
from pathlib import Path

import torch

from dgmr import artefact
from dgmr.files import ORIGIN, replaced_folder
from dgmr.images import calibration_images, count_of, some_tokens
from dgmr.mlps import recorded_mlp_inputs
from dgmr.models import device
from dgmr.params import Features
from dgmr.progress import progress
from dgmr.streaming import streamed
from dgmr.weights import Rows


@torch.inference_mode()
def compute(teacher: Path, data: Path, config: Features, output: Path) -> None:
    """Write ``<mlp>.safetensors`` with ``inputs`` ``[images, tokens, N]`` float32 for every MLP."""
    where = device()
    teacher_sha256 = artefact.provenance(teacher)["sha256"]
    model = streamed(teacher, where)
    images = calibration_images(data, model, config)
    generator = torch.Generator().manual_seed(config.calibration.seed)
    files: dict[str, Rows] = {}
    origin = {ORIGIN: json.dumps({"teacher_sha256": teacher_sha256})}
    with (
        replaced_folder(output) as folder,
        recorded_mlp_inputs(model) as inputs,
        progress("calibration", count_of(images)) as advance,
    ):
        for batch in images:
            inputs.clear()
            model(batch.to(where))
            for name, value in inputs.items():
                chosen = some_tokens(value, config.calibration.tokens, generator)
                if name not in files:
                    shape = [count_of(images), *chosen.shape[1:]]
                    layout = {"inputs": torch.empty(shape, device="meta")}
                    files[name] = Rows(folder / f"{name}.safetensors", layout, origin)
                files[name].add({"inputs": chosen})
            advance(len(batch))
        for file in files.values():
            file.close()
