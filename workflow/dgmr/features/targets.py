"""The teacher's outputs for every (sample, view) of some shards."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from dgmr import artefact, targets
from dgmr.files import ORIGIN, replaced_folder
from dgmr.models import device, loader_workers, outputs
from dgmr.params import Features
from dgmr.progress import progress
from dgmr.shards import ShardedImages
from dgmr.views import ViewTransform


class _Views(Dataset[torch.Tensor]):
    """All samples of one shard, as one view shows them."""

    def __init__(self, images: ShardedImages, transform: ViewTransform, view: int) -> None:
        self.images, self.transform, self.view = images, transform, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.images.image(index), self.images.keys[index], self.view)


@torch.inference_mode()
def compute(teacher: Path, data: Path, shards: list[str], config: Features, output: Path) -> None:
    """Write the targets of ``shards`` to the folder ``output``, a file a shard and view."""
    where = device()
    model = artefact.load(teacher).to(where)
    teacher_sha256 = artefact.provenance(teacher)["sha256"]
    transform = ViewTransform.for_model(model, config.views)
    stored = targets.dtype(config.dtype)
    opened = [(shard, ShardedImages(data, [shard], verify=True)) for shard in shards]
    total = config.views.count * sum(len(images) for _, images in opened)
    with replaced_folder(output) as folder, progress("targets", total) as advance:
        for shard, images in opened:
            origin = {"teacher_sha256": teacher_sha256, "shard_sha256": images.shards[0].sha256}
            for view in range(config.views.count):
                loader = DataLoader(
                    _Views(images, transform, view), config.batch_size, num_workers=loader_workers()
                )
                pooled, patch_tokens = [], []
                for batch in loader:
                    said = outputs(model, batch.to(where))
                    pooled.append(said.pooled.to("cpu", stored))
                    patch_tokens.append(said.patch_tokens.to("cpu", stored))
                    advance(len(batch))
                if not pooled:  # not one image of this shard could be had
                    continue
                save_file(
                    {"pooled": torch.cat(pooled), "patch_tokens": torch.cat(patch_tokens)},
                    folder / targets.file_name(shard, view),
                    metadata={ORIGIN: json.dumps(origin)},
                )
