"""One MLP of the teacher on the way through the prune room; its tensors are read when asked for."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dgmr import artefact, weights
from dgmr.mlps import PrunableMlp
from dgmr.targets import Manifest

TOKENS_AT_ONCE = 4096
# Every eighth image is held out, wherever something is chosen by its error.
_HELD_OUT = 8


@dataclass(frozen=True)
class Block:
    """M: hidden units, N: inputs and outputs of the MLP."""

    teacher: Path
    """The teacher's artefact."""
    name: str
    """Of the MLP's module."""
    skeleton: PrunableMlp
    """The MLP on the meta device."""
    features: Manifest | None = None
    """The features room, where calibration inputs are needed."""
    scores: Path | None = None
    """Folder of saliencies, where the method is ``taylor``."""

    def vectors(self) -> Tensor:
        """``[M, N]`` or ``[M, 2N]``, of the checkpoint's dtype; only those weights are read."""
        return self.skeleton.vectors(self._tensors(self.skeleton.vector_tensors))

    def mlp(self) -> PrunableMlp:
        """The MLP with all its weights, in float32."""
        module = copy.deepcopy(self.skeleton.module)
        tensors = self._tensors(list(module.state_dict()))
        module.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return PrunableMlp(module.eval().requires_grad_(False), self.skeleton.in_pool_head)

    def inputs(self, most: int | None = None) -> Iterator[tuple[Tensor, bool]]:
        """Calibration inputs ``[tokens, N]``, piece by piece, and whether their images are held out.

        At most ``most`` tokens, drawn at random from all: in a grid over the image some places would
        never be seen.
        """
        assert self.features is not None
        with safe_open(self.features.calibration(self.name), framework="pt") as file:
            stored = file.get_slice("inputs")
            images, tokens, _ = stored.get_shape()
            drawn = torch.randperm(images * tokens, generator=torch.Generator().manual_seed(0))
            taken = torch.zeros(images * tokens, dtype=torch.bool)
            taken[drawn[:most]] = True
            taken = taken.view(images, tokens)
            at_once = max(TOKENS_AT_ONCE // tokens, 1)
            for start in range(0, images, at_once):
                piece: Tensor = stored[start : min(start + at_once, images)]
                held_out = held_out_images(start, len(piece))
                for chosen_held_out in (False, True):
                    chosen = (
                        taken[start : start + len(piece)] & (held_out == chosen_held_out)[:, None]
                    )
                    if chosen.any():
                        yield piece[chosen], chosen_held_out

    def saliency(self) -> Tensor:
        """``[M]``, as :mod:`dgmr.prune.saliency` computed it."""
        assert self.scores is not None
        with safe_open(self.scores / f"{self.name}.safetensors", framework="pt") as file:
            scores: Tensor = file.get_tensor("scores")
        return scores

    def _tensors(self, names: list[str]) -> dict[str, Tensor]:
        prefix = f"{self.name}."
        found = weights.tensors(self.teacher / artefact.WEIGHTS, [prefix + name for name in names])
        return {name.removeprefix(prefix): tensor for name, tensor in found}


def held_out_images(first: int, count: int) -> Tensor:
    """Which of the ``count`` calibration images from the ``first`` on are held out: bool ``[count]``."""
    return torch.arange(first, first + count) % _HELD_OUT == _HELD_OUT - 1
