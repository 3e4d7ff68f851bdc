"""What a stage trains on, and in which order: (sample, view) pairs and what the teacher answered."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from dgmr.shards import ShardedImages
from dgmr.targets import PIXELS, Manifest, Row, Targets
from dgmr.views import ViewTransform

Pair = tuple[int, int]
"""A sample's index and a view."""


class Batch(NamedTuple):
    """B pairs on their way to the student."""

    pixels: Tensor
    """``[B, C, H, W]``, uint8; :meth:`dgmr.views.ViewTransform.normalised` makes them the model's."""
    answers: dict[str, Tensor]
    """What the teacher answered, by name, where it was asked beforehand."""
    pairs: list[Pair]


class Pairs(Dataset[Batch]):
    """All (sample, view) pairs of the data room, in batches, with their cached targets if there are any."""

    def __init__(self, data: Path, features: Path, model: nn.Module, verify: bool = True) -> None:
        """Open the shards of ``data`` and the targets of ``features`` for ``model``.

        ``verify`` reads all that will be read once before, and compares hashes.

        Raises:
            DgmrError: a file is missing or not the one its manifest lists, or the features are about
                other pixels than ``model`` takes.
        """
        manifest = Manifest(features)
        config = manifest.config
        cached = config.cache == "disk"
        self.transform = ViewTransform.for_model(model, config.views)
        manifest.check_transform(self.transform.about())
        self.images = ShardedImages(data, verify=verify and not (cached and config.pixels))
        self.targets = Targets(manifest.targets(self.images.shards)) if cached else None
        if cached and verify:
            manifest.verify_targets()

    def __getitem__(self, pairs: list[Pair]) -> Batch:
        """The batch of these pairs."""
        answers: dict[str, Tensor] = {}
        if self.targets is not None:
            rows = [Row(*self.images.locate(index), view) for index, view in pairs]
            answers = self.targets.read(rows)
        pixels = answers.pop(PIXELS, None)
        if pixels is None:
            pixels = torch.stack([self._pixels(*pair) for pair in pairs])
        return Batch(pixels, answers, pairs)

    def _pixels(self, index: int, view: int) -> Tensor:
        return self.transform(self.images.image(index), self.images.keys[index], view)


class PairOrder(NamedTuple):
    """Which pairs come after one another, without end: epoch e shows every sample once, in view e mod K.

    A pure function of (seed, epoch).
    """

    samples: int
    views: int
    """K."""
    seed: int

    def pairs(self, start: int = 0) -> Iterator[Pair]:
        """All pairs from position ``start`` on."""
        first_epoch, skipped = divmod(start, self.samples)
        for epoch in itertools.count(first_epoch):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shuffled = torch.randperm(self.samples, generator=generator)
            for index in shuffled[skipped:]:
                yield int(index), epoch % self.views
            skipped = 0


class Batches(Sampler[list[Pair]]):
    """The pairs of each of some steps; of them, those that one of several processes takes.

    A step's pairs do not depend on how many processes share them, nor on the step at which one begins.
    """

    def __init__(
        self, order: PairOrder, batch_size: int, steps: range, rank: int = 0, processes: int = 1
    ) -> None:
        """``batch_size`` of all processes together; ``steps`` are counted from 0."""
        self.order, self.batch_size, self.steps = order, batch_size, steps
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Pair]]:
        pairs = self.order.pairs(self.steps.start * self.batch_size)
        for _ in self.steps:
            step = list(itertools.islice(pairs, self.batch_size))
            yield step[self.rank :: self.processes]
