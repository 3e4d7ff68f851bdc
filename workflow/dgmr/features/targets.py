"""The teacher's answers about every (sample, view) of some shards."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr import artefact, targets
from dgmr.answers import Answers, row_layout
from dgmr.files import ORIGIN, replaced_folder
from dgmr.models import autocast, device, loader_workers
from dgmr.params import Features
from dgmr.progress import progress
from dgmr.shards import ShardedImages
from dgmr.views import ViewTransform
from dgmr.weights import Rows


class _Views(Dataset[Tensor]):
    """All samples of one shard, as one view shows them."""

    def __init__(self, images: ShardedImages, transform: ViewTransform, view: int) -> None:
        self.images, self.transform, self.view = images, transform, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images.image(index), self.images.keys[index], self.view)


@torch.inference_mode()
def compute(teacher: Path, data: Path, shards: list[str], config: Features, output: Path) -> None:
    """Write the targets of ``shards`` to the folder ``output``, a file a shard and view.

    Raises:
        DgmrError: the disk cannot hold them, or a shard is not the one listed.
    """
    where = device()
    model = artefact.load(teacher)
    transform = ViewTransform.for_model(model, config.views)
    about = targets.about(artefact.provenance(teacher)["sha256"], transform.about(), config)
    opened = [ShardedImages(data, [shard], verify=True) for shard in shards]
    total = config.views.count * sum(map(len, opened))
    row = row_layout(artefact.skeleton(teacher), config)
    targets.check_space(total * sum(tensor.nbytes for tensor in row.values()), output)
    answers = Answers(model.to(where), config)
    with replaced_folder(output) as folder, progress("targets", total) as advance:
        for shard, images in zip(shards, opened, strict=True):
            if not len(images):  # not one image of this shard could be had
                continue
            origin = about | {"shard_sha256": images.shards[0].sha256}
            for view in range(config.views.count):
                loader = DataLoader(
                    _Views(images, transform, view), config.batch_size, num_workers=loader_workers()
                )
                file = Rows(
                    folder / targets.file_name(shard, view),
                    {name: t.expand(len(images), *t.shape[1:]) for name, t in row.items()},
                    {ORIGIN: json.dumps(origin)},
                )
                for pixels in loader:
                    with autocast(where, config.precision):
                        rows = answers(transform.normalised(pixels.to(where)))
                    file.add(rows | {targets.PIXELS: pixels})
                    advance(len(pixels))
                file.close()
