"""Top-1, top-5 and agreement with the teacher on the evaluation shards; parameters and FLOPs."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import write_json
from dgmr.models import (
    Outputs,
    TimmModel,
    count_parameters,
    device,
    evaluation_transform,
    flops,
    loader_workers,
    outputs_and_logits,
)
from dgmr.progress import progress
from dgmr.shards import ShardedImages


class _Labelled(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: ShardedImages, transform: Any) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = self.images.labels[index]
        assert label is not None  # evaluation shards are labelled
        return self.transform(self.images.image(index)), label


@torch.inference_mode()
def evaluate(
    name: str, folder: Path, teacher: Path, data: Path, batch_size: int, output: Path
) -> None:
    """Write what the model artefact ``folder`` scores on the evaluation shards ``data`` to ``output``.

    The teacher itself gets no agreement with the teacher; a model without a classifier no accuracy.
    """
    where = device()
    about = artefact.provenance(folder)
    model = artefact.load(folder).to(where)
    teacher_sha256 = artefact.provenance(teacher)["sha256"]
    is_teacher = about["sha256"] == teacher_sha256
    reference = None if is_teacher else artefact.load(teacher).to(where)
    images = ShardedImages(data, verify=True)
    check_labels(images, model)
    loader = DataLoader(
        _Labelled(images, evaluation_transform(model)), batch_size, num_workers=loader_workers()
    )
    sums: Counter[str] = Counter()
    with progress(f"evaluate {name}", len(images)) as advance:
        for batch, labels in loader:
            batch, labels = batch.to(where), labels.to(where)
            answer, logits = outputs_and_logits(model, batch)
            if logits is not None:
                sums.update(_hits(logits, labels))
            if reference is not None:
                sums.update(_agreement(answer, logits, *outputs_and_logits(reference, batch)))
            advance(len(batch))
    write_json(
        output,
        {
            "model": name,
            "sha256": about["sha256"],
            "teacher_sha256": teacher_sha256,
            "samples": len(images),
            **{key: value / len(images) for key, value in sums.items()},
            "params": count_parameters(model),
            "flops": flops(model),
        },
    )


def check_labels(images: ShardedImages, model: TimmModel) -> None:
    """Refuse labels that the model's classifier cannot give.

    Raises:
        DgmrError: a label is missing, or is no class of the model.
    """
    labels = [label for label in images.labels if label is not None]
    if len(labels) < len(images):
        raise DgmrError(f"data.eval: {len(images) - len(labels)} images have no label.")
    if model.num_classes and not 0 <= min(labels) <= max(labels) < model.num_classes:
        raise DgmrError(
            f"data.eval: labels go from {min(labels)} to {max(labels)}, but the model has"
            f" {model.num_classes} classes: give images of the classes it was trained on."
        )


def _hits(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of ``[B, classes]`` hits, summed over the batch."""
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": 100.0 * int(top5[:, 0].sum()), "top5": 100.0 * int(top5.sum())}


def _agreement(
    answer: Outputs, logits: Tensor | None, teacher: Outputs, teacher_logits: Tensor | None
) -> dict[str, float]:
    """Summed over the batch; ``feature_mse`` is DGMR's loss: pooled plus patch tokens."""
    pooled = (answer.pooled - teacher.pooled).square().double().flatten(1).mean(1)
    tokens = (answer.patch_tokens - teacher.patch_tokens).square().double().flatten(1).mean(1)
    found = {
        "pooled_mse": float(pooled.sum()),
        "patch_tokens_mse": float(tokens.sum()),
        "feature_mse": float((pooled + tokens).sum()),
        "cosine": float(F.cosine_similarity(answer.pooled, teacher.pooled).double().sum()),
    }
    if logits is not None and teacher_logits is not None:
        found["same_top1"] = 100.0 * int((logits.argmax(1) == teacher_logits.argmax(1)).sum())
    return found
