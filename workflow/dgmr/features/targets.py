"""The teacher's answers about every (sample, view) of some shards."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgmr import artefact, targets
from dgmr.answers import Answers, bytes_per_view, layout
from dgmr.errors import DgmrError
from dgmr.files import ORIGIN, readable, replaced_folder
from dgmr.models import device, loader_workers
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
    skeleton = artefact.skeleton(teacher)
    check_space(total * bytes_per_view(skeleton, config), output)
    said = layout(skeleton, config)
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
                file: Rows | None = None
                for pixels in loader:
                    with torch.autocast(where.type, torch.bfloat16, config.precision == "bfloat16"):
                        rows = answers(transform.normalised(pixels.to(where)))
                    rows |= {targets.PIXELS: pixels} if config.pixels else {}
                    if file is None:
                        file = Rows(
                            folder / targets.file_name(shard, view),
                            _file_layout(said, pixels, len(images), config),
                            {ORIGIN: json.dumps(origin)},
                        )
                    file.add(rows)
                    advance(len(pixels))
                assert file is not None
                file.close()


def check_space(wanted: int, folder: Path) -> None:
    """Refuse to begin what the disk of ``folder`` cannot hold; ``wanted`` in bytes.

    Raises:
        DgmrError: naming both sizes and what makes the targets smaller.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise DgmrError(
            f"features: the targets take {readable(wanted)}, but the disk of {folder} has"
            f" {readable(free)} left: lower features.views.count, ask for fewer patch_tokens or"
            " blocks, or choose features.cache: none."
        )


def _file_layout(
    said: dict[str, Tensor], pixels: Tensor, count: int, config: Features
) -> dict[str, Tensor]:
    """Of the file of a shard of ``count`` samples, on the meta device."""
    stored = getattr(torch, config.dtype)
    shapes = {name: (tensor.shape[1:], stored) for name, tensor in said.items()}
    shapes |= {targets.PIXELS: (pixels.shape[1:], torch.uint8)} if config.pixels else {}
    return {
        name: torch.empty([count, *shape], dtype=dtype, device="meta")
        for name, (shape, dtype) in shapes.items()
    }
