"""What the stages need to know of a timm model: its outputs, its MLPs, its transforms.

B: batch, T: tokens, D: embed dim, N: inputs of an MLP, M: its hidden neurons.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.layers import Mlp
from timm.models import get_model_args
from torch import Tensor, nn
from torchvision.transforms import Compose

from dgmr.errors import DgmrError

TimmModel: TypeAlias = Any
"""A timm model: an ``nn.Module`` with ``forward_features``, ``forward_head``, ``num_classes`` and
``pretrained_cfg``, of which torch's types know nothing."""


class Outputs(NamedTuple):
    """What a model says of a batch, after its final norm where its family has one."""

    pooled: Tensor
    """``[B, D]``: class token or pooled tokens, as the classifier receives them."""
    patch_tokens: Tensor
    """``[B, T, D]``: the last block's, without class and register tokens."""


def device() -> torch.device:
    """The accelerator of this machine, else its CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def loader_workers() -> int:
    """Loader processes beside the one that computes: one for every four of its threads.

    With few cores they would only take them from the computing.
    """
    return torch.get_num_threads() // 4


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


def mlps(model: TimmModel) -> dict[str, Mlp]:
    """The MLPs that can be pruned, by module name, in the order of the network.

    Raises:
        DgmrError: there is none, or one is of a kind that cannot be pruned yet.
    """
    found = {}
    for name, module in model.named_modules():
        if type(module) is Mlp:
            if not isinstance(module.norm, nn.Identity) or isinstance(module.fc1, nn.Conv2d):
                raise DgmrError(
                    f"{_name(model)}: {name} is an MLP with an inner norm or convolutions,"
                    " which cannot be pruned yet; choose a model with plain timm Mlp blocks."
                )
            found[name] = module
        elif name.rpartition(".")[2] == "mlp" and not isinstance(module, nn.Identity):
            raise DgmrError(
                f"{_name(model)}: {name} is a {type(module).__name__}, which cannot be pruned yet;"
                " choose a model with plain timm Mlp blocks."
            )
    if not found:
        raise DgmrError(f"{_name(model)} has no timm Mlp blocks, so there is nothing to prune.")
    return found


def widths(model: TimmModel) -> dict[str, int]:
    """Hidden neurons of every MLP, by module name."""
    return {name: mlp.fc1.out_features for name, mlp in mlps(model).items()}


def largest_ratio(model: TimmModel) -> float:
    """Ratio of hidden neurons to embed dim at which the first MLP loses none."""
    return min(mlp.fc1.out_features / mlp.fc1.in_features for mlp in mlps(model).values())


@contextmanager
def recorded_mlp_inputs(model: TimmModel) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass puts the MLPs' inputs into the given dict, by module name.

    Inputs are ``[B, T, N]``; Swin's ``[B, H, W, N]`` are flattened to that, a lone token's ``[B, N]`` too.
    """
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            value = arguments[0].detach()
            inputs[name] = value.reshape(len(value), -1, value.shape[-1])

        return record

    hooks = [mlp.register_forward_pre_hook(recorder(name)) for name, mlp in mlps(model).items()]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def evaluation_transform(model: TimmModel) -> Compose:
    """The transform of the model's ``pretrained_cfg``: PIL image to normalised ``[C, H, W]``."""
    return create_transform(**resolve_model_data_config(model), is_training=False)


def input_size(model: TimmModel) -> tuple[int, int, int]:
    """Channels, height and width of the images the model takes."""
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return channels, height, width


def like(model: TimmModel, **changes: Any) -> TimmModel:
    """An untrained timm model built as ``model`` was, but for ``changes`` of its arguments."""
    arguments = get_model_args(model) | changes
    config = dict(model.pretrained_cfg)
    return timm.create_model(config["architecture"], pretrained_cfg=config, **arguments)


def _name(model: TimmModel) -> str:
    return str(model.pretrained_cfg.get("architecture", type(model).__name__))
