"""What a stage trains on, and in which order: (sample, view) pairs with the teacher's outputs."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from dgmr.models import Outputs
from dgmr.params import Views
from dgmr.shards import ShardedImages
from dgmr.targets import Manifest, Targets
from dgmr.views import ViewTransform


class Pair(NamedTuple):
    """The pixels ``[C, H, W]`` of a (sample, view), and what the teacher said of them."""

    image: Tensor
    teacher: Outputs


class Pairs(Dataset[Pair]):
    """All (sample, view) pairs of the data room, with their cached targets."""

    def __init__(self, data: Path, features: Path, model: nn.Module) -> None:
        """Open the shards of ``data`` and the verified targets of ``features`` for ``model``.

        Raises:
            DgmrError: a file is missing or not the one its manifest lists.
        """
        self.images = ShardedImages(data)
        manifest = Manifest(features)
        self.views = Views.model_validate(manifest.views)
        self.transform = ViewTransform.for_model(model, self.views)
        self.targets = Targets(
            {
                (shard.name, view): manifest.target(shard, view)
                for shard in self.images.shards
                if shard.samples
                for view in range(self.views.count)
            }
        )

    def __getitem__(self, pair: tuple[int, int]) -> Pair:
        """The pair of a sample's index and a view."""
        index, view = pair
        image = self.transform(self.images.image(index), self.images.keys[index], view)
        return Pair(image, self.targets.read(*self.images.locate(index), view))


class PairOrder(Sampler[tuple[int, int]]):
    """The first ``total`` pairs of the stage: epoch e shows every sample once, in view e mod K.

    A pure function of (seed, epoch).
    """

    def __init__(self, samples: int, views: int, total: int, seed: int) -> None:
        self.samples, self.views, self.total, self.seed = samples, views, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.islice(self._endless(), self.total)

    def _endless(self) -> Iterator[tuple[int, int]]:
        for epoch in itertools.count():
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            for index in torch.randperm(self.samples, generator=generator).tolist():
                yield index, epoch % self.views
