"""What the stages need to know of a timm model: its outputs, its transforms, how to build its like.

B: batch, T: tokens, D: embed dim.
"""

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
from filelock import FileLock, Timeout
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_model_args
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose

TimmModel: TypeAlias = Any
"""A timm model: an ``nn.Module`` with ``forward_features``, ``forward_head``, ``num_classes`` and
``pretrained_cfg``, of which torch's types know nothing."""


_locks: list[FileLock] = []


class Outputs(NamedTuple):
    """What a model says of a batch, after its final norm where its family has one."""

    pooled: Tensor
    """``[B, D]``: class token or pooled tokens, as the classifier receives them."""
    patch_tokens: Tensor
    """``[B, T, D]``: the last block's, without class and register tokens."""


def device() -> torch.device:
    """An accelerator of this machine that no other job of ours has taken, else its CPU.

    Snakemake counts GPUs but does not say which is whose: the first whose lock is free is this
    process's until it ends. Where all are taken it shares the first one.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    return torch.device(found.type, _taken(found.type, count)) if count > 1 else found


@functools.cache
def _taken(kind: str, count: int) -> int:
    """The first free one of ``count`` accelerators, which is taken from now on."""
    for index in range(count):
        lock = FileLock(Path(tempfile.gettempdir()) / f"dgmr-{kind}-{index}.lock", mode=0o666)
        with contextlib.suppress(Timeout):
            lock.acquire(blocking=False)
            _locks.append(lock)
            return index
    return 0


def loader_workers() -> int:
    """Loader processes beside the one that computes: one for every four of its threads.

    With few cores they would only take them from the computing.
    """
    return torch.get_num_threads() // 4


def autocast(where: torch.device, precision: str) -> torch.autocast:
    """Within it matrix products are computed in ``precision``, ``float32`` or ``bfloat16``."""
    return torch.autocast(where.type, torch.bfloat16, enabled=precision == "bfloat16")


def outputs(model: TimmModel, images: Tensor) -> Outputs:
    """Pooled output and patch tokens of normalised ``images`` ``[B, C, H, W]``."""
    return _outputs(model, model.forward_features(images))


def outputs_and_logits(model: TimmModel, images: Tensor) -> tuple[Outputs, Tensor | None]:
    """As :func:`outputs`, and class logits ``[B, classes]``, or None where the model has no classifier."""
    features = model.forward_features(images)
    logits = model.forward_head(features) if model.num_classes else None
    return _outputs(model, features), logits


def _outputs(model: TimmModel, features: Tensor) -> Outputs:
    pooled = model.forward_head(features, pre_logits=True)
    if features.ndim == 4:  # Swin: [B, H, W, D]
        return Outputs(pooled, features.flatten(1, 2))
    return Outputs(pooled, features[:, getattr(model, "num_prefix_tokens", 0) :])


def evaluation_transform(model: TimmModel) -> Compose:
    """The transform of the model's ``pretrained_cfg``: PIL image to normalised ``[C, H, W]``."""
    return create_transform(**resolve_model_data_config(model), is_training=False)


def input_size(model: TimmModel) -> tuple[int, int, int]:
    """Channels, height and width of the images the model takes."""
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return channels, height, width


def count_parameters(model: TimmModel) -> int:
    """Numbers that the model has learnt."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: TimmModel) -> int:
    """Floating-point operations of one image's forward pass, a multiply-add counting two."""
    return flops_by_module(model)[""]


def flops_by_module(model: TimmModel) -> dict[str, int]:
    """As :func:`flops`, by module name, modules within it included; those that have none are left out."""
    image = torch.zeros(1, *input_size(model), device=next(model.parameters()).device)
    # Of attention's kernels, the counter knows not all; as plain matrix products it counts it everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    root = type(model).__name__
    found = {"": int(counter.get_total_flops())}
    for name, by_operator in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name.removeprefix(f"{root}.")] = sum(by_operator.values())
    return found


def like(model: TimmModel, **changes: Any) -> TimmModel:
    """An untrained timm model built as ``model`` was, but for ``changes`` of its arguments."""
    arguments = get_model_args(model) | changes
    config = dict(model.pretrained_cfg)
    return timm.create_model(config["architecture"], pretrained_cfg=config, **arguments)
