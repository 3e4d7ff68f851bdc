"""What is asked of a model for the distillation: the teacher and the student give the same tensors.

::

    pooled         [B, D]      class token or pooled tokens, as the classifier receives them
    patch_tokens   [B, T', D]  every k-th patch token of the last block
    blocks.<i>     [B, T, N]   all output tokens of block i

B: batch, D: embed dim, T: tokens.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from dgmr.errors import DgmrError
from dgmr.mlps import blocks
from dgmr.models import TimmModel, input_size, outputs
from dgmr.params import Features
from dgmr.targets import PIXELS

POOLED, PATCH_TOKENS, BLOCK = "pooled", "patch_tokens", "blocks."


class Answers(nn.Module):
    """A timm model whose forward pass gives what the section ``features`` asks for, by name."""

    def __init__(self, model: TimmModel, config: Features) -> None:
        """Wrap ``model``, which stays as it is.

        Raises:
            DgmrError: it has no such block.
        """
        super().__init__()
        self.model = model
        self.every = config.patch_tokens
        found = list(blocks(model).values())
        for index in config.blocks:
            if index >= len(found):
                raise DgmrError(
                    f"features.blocks: there is no block {index}; the model's are 0 to {len(found) - 1}."
                )
        self._asked = {f"{BLOCK}{index}": found[index] for index in config.blocks}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The answers to normalised ``images`` ``[B, C, H, W]``."""
        of_blocks: dict[str, Tensor] = {}
        # Only now: activation checkpointing runs the blocks again in the backward pass.
        with ExitStack() as hooks:
            for name, block in self._asked.items():
                hooks.enter_context(block.register_forward_hook(_recorder(name, of_blocks)))
            said = outputs(self.model, images)
        answers = {POOLED: said.pooled}
        if self.every is not None:
            answers[PATCH_TOKENS] = said.patch_tokens[:, :: self.every]
        return answers | of_blocks


def _recorder(name: str, found: dict[str, Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
    def record(_block: nn.Module, _arguments: object, output: Tensor) -> None:
        # Swin's are [B, H, W, N].
        found[name] = output.reshape(len(output), -1, output.shape[-1])

    return record


def layout(model: TimmModel, config: Features) -> dict[str, Tensor]:
    """The answers to one image, on the meta device: names and shapes ``[1, ...]``.

    ``model`` is on the meta device.
    """
    with torch.no_grad():
        answers: dict[str, Tensor] = Answers(model, config)(
            torch.zeros(1, *input_size(model), device="meta")
        )
    return answers


def row_layout(model: TimmModel, config: Features) -> dict[str, Tensor]:
    """What a targets file holds of one (sample, view), on the meta device as ``model`` is: the answers
    in their dtype on disk, and the pixels where they are wanted."""
    stored = getattr(torch, config.dtype)
    row = {name: tensor.to(stored) for name, tensor in layout(model, config).items()}
    if config.pixels:
        row[PIXELS] = torch.empty(1, *input_size(model), dtype=torch.uint8, device="meta")
    return row


def bytes_per_view(model: TimmModel, config: Features) -> int:
    """What the targets of one (sample, view) take on disk; ``model`` is on the meta device."""
    return sum(tensor.nbytes for tensor in row_layout(model, config).values())
