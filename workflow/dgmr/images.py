"""Calibration images: the first training images, as a model sees them without augmentation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr.models import TimmModel, evaluation_transform, loader_workers
from dgmr.params import Features
from dgmr.shards import ShardedImages, first


class _First(Dataset[Tensor]):
    """The selection has put the images in random order, so the first are as good as any."""

    def __init__(self, images: ShardedImages, count: int, transform: Any) -> None:
        self.images, self.count, self.transform = images, count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images.image(index))


def calibration_images(data: Path, model: TimmModel, config: Features) -> DataLoader[Tensor]:
    """Batches ``[B, C, H, W]`` of the calibration images in the data room, normalised for ``model``."""
    wanted = config.calibration.samples
    images = ShardedImages(data, first(data, wanted), verify=True)
    count = min(wanted, len(images))
    return DataLoader(
        _First(images, count, evaluation_transform(model)),
        config.batch_size,
        num_workers=loader_workers(),
    )


def count_of(batches: DataLoader[Tensor]) -> int:
    """Images in all batches."""
    return len(batches.dataset)  # type: ignore[arg-type]


def some_tokens(inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` tokens of each image, drawn anew for each: ``[B, T, N]`` to ``[B, count, N]``."""
    if inputs.shape[1] <= count:
        return inputs
    chosen = torch.rand(inputs.shape[:2], generator=generator).argsort(1)[:, :count]
    return inputs.take_along_dim(chosen[:, :, None].to(inputs.device), dim=1)
