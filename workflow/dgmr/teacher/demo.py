"""Train the demo teacher: a small ViT with wide MLPs (ratio 8, as EVA-CLIP-E's 8.57) on Fashion-MNIST.

The default run starts from a teacher that was trained beforehand, as real use does. This module is
how that teacher was made; it is no part of the chain.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Literal

import timm
import torch
from rich.progress import Progress
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.nn import functional as F

from dgmr import artefact, fashion_mnist

log = logging.getLogger(__name__)

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 8.0,
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Supervised training of the demo teacher; epochs are passes over the 60,000 train images."""

    seed: int = 0
    epochs: int = 32
    warmup_epochs: float = 1.0
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 2e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    max_shift: int = 2


def train(output: Path, download_folder: Path, recipe: Recipe = Recipe()) -> float:
    """Train with ``recipe``, write a model artefact to ``output``, return its test top-1 in percent."""
    torch.manual_seed(recipe.seed)
    images, labels = _tensors("train", download_folder)
    test_images, test_labels = _tensors("test", download_folder)
    pretrained_cfg = {
        "input_size": [3, 28, 28],
        "mean": [fashion_mnist.MEAN] * 3,
        "std": [fashion_mnist.STD] * 3,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "label_names": list(fashion_mnist.CLASSES),
        "license": "mit",
    }
    model = timm.create_model(
        ARCHITECTURE, num_classes=10, pretrained_cfg_overlay=pretrained_cfg, **MODEL_ARGS
    )
    optimizer = create_optimizer_v2(
        model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=recipe.min_lr,
        warmup_t=int(recipe.warmup_epochs * len(images) // recipe.batch_size),
        t_in_epochs=False,
    )
    step = 0
    with Progress() as progress:
        bar = progress.add_task("train demo teacher", total=steps)
        for epoch in range(recipe.epochs):
            model.train()
            for batch in torch.randperm(len(images)).split(recipe.batch_size):
                if len(batch) < recipe.batch_size:
                    continue
                schedule.step_update(step)
                logits = model(_augment(images[batch], recipe.max_shift))
                loss = F.cross_entropy(
                    logits, labels[batch], label_smoothing=recipe.label_smoothing
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                progress.update(bar, completed=step)
            top1 = _top1(model, test_images, test_labels)
            log.info("epoch %d: train loss %.3f, test top-1 %.2f%%", epoch + 1, loss.item(), top1)
    artefact.save(
        output,
        model,
        {
            "made_by": "train_demo_teacher",
            "recipe": dataclasses.asdict(recipe),
            "torch_threads": torch.get_num_threads(),
            "test_top1": top1,
        },
    )
    return top1


def _tensors(split: Literal["train", "test"], download_folder: Path) -> tuple[Tensor, Tensor]:
    images, labels = fashion_mnist.load(split, download_folder)
    normalised = (torch.tensor(images).float() / 255 - fashion_mnist.MEAN) / fashion_mnist.STD
    return normalised[:, None], torch.tensor(labels).long()


def _augment(images: Tensor, max_shift: int) -> Tensor:
    """Shift each of ``[B, 1, H, W]`` by up to ``max_shift`` pixels and mirror half; ``[B, 3, H, W]``."""
    size = images.shape[-1]
    background = -fashion_mnist.MEAN / fashion_mnist.STD
    padded = F.pad(images, [max_shift] * 4, value=background)
    shifts = torch.randint(0, 2 * max_shift + 1, (2, len(images), 1))
    rows, columns = (shift + torch.arange(size) for shift in shifts)
    mirrored = torch.rand(len(images), 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]][:, None].expand(-1, 3, -1, -1)


@torch.inference_mode()
def _top1(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = 0
    for batch, truth in zip(images.split(500), labels.split(500), strict=True):
        hits += int((model(batch.expand(-1, 3, -1, -1)).argmax(1) == truth).sum())
    return 100 * hits / len(images)
