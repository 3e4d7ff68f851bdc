"""Inputs of every MLP for some training images, as the teacher sees them without augmentation."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr import artefact
from dgmr.files import ORIGIN, replaced_folder
from dgmr.models import device, evaluation_transform, loader_workers, recorded_mlp_inputs
from dgmr.params import Calibration
from dgmr.progress import progress
from dgmr.shards import ShardedImages


class _Images(Dataset[Tensor]):
    """The first ``count`` training images: the selection has put them in random order."""

    def __init__(self, images: ShardedImages, count: int, transform: object) -> None:
        self.images, self.count, self.transform = images, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images.image(index))  # type: ignore[operator]


@torch.inference_mode()
def compute(teacher: Path, data: Path, config: Calibration, batch_size: int, output: Path) -> None:
    """Write ``<mlp>.safetensors`` with ``inputs`` ``[tokens, N]`` float32 for every MLP to ``output``."""
    where = device()
    model = artefact.load(teacher).to(where)
    images = ShardedImages(data)
    count = min(config.samples, len(images))
    loader = DataLoader(
        _Images(images, count, evaluation_transform(model)),
        batch_size,
        num_workers=loader_workers(),
    )
    generator = torch.Generator().manual_seed(config.seed)
    kept: dict[str, list[Tensor]] = {}
    with recorded_mlp_inputs(model) as inputs, progress("calibration", count) as advance:
        for batch in loader:
            inputs.clear()
            model(batch.to(where))
            for name, value in inputs.items():
                kept.setdefault(name, []).append(_some_tokens(value, config.tokens, generator))
            advance(len(batch))
    origin = {"teacher_sha256": artefact.provenance(teacher)["sha256"]}
    with replaced_folder(output) as folder:
        for name, parts in kept.items():
            save_file(
                {"inputs": torch.cat(parts)},
                folder / f"{name}.safetensors",
                metadata={ORIGIN: json.dumps(origin)},
            )


def _some_tokens(inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` tokens of each image, drawn anew for each: ``[B, T, N]`` to ``[B * count, N]``."""
    if inputs.shape[1] > count:
        chosen = torch.rand(inputs.shape[:2], generator=generator).argsort(1)[:, :count]
        inputs = inputs.take_along_dim(chosen[:, :, None].to(inputs.device), dim=1)
    return inputs.flatten(0, 1).float().cpu().contiguous()
