"""Views: random crops, flips and colours of an image that anyone can make again.

What is drawn is a pure function of (seed, sample key, view), so the student sees the very pixels that
the teacher was asked about, in any process, without a global random state.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import functional

from dgmr.fingerprint import versions
from dgmr.params import Views

# As DINOv2's: its crops are 224 pixels wide.
_BLUR_KERNEL, _BLUR_SIGMA = 9, (0.1, 2.0)
_SOLARIZE_FROM = 128


@dataclass(frozen=True)
class ViewTransform:
    """PIL image to the pixels ``[C, H, W]`` of a view, uint8, and from them to what the model takes."""

    views: Views
    size: tuple[int, int]
    """Height and width, pixels."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def for_model(cls, model: nn.Module, views: Views) -> "ViewTransform":
        """The views as ``model`` takes them: its input size, interpolation, mean and std."""
        config = resolve_model_data_config(model)
        height, width = config["input_size"][1:]
        return cls(views, (height, width), config["interpolation"], config["mean"], config["std"])

    def __call__(self, image: Image.Image, key: str, view: int) -> Tensor:
        """The pixels of ``view`` of the sample ``key``."""
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which also seeds the accelerators' generators.
            torch.default_generator.manual_seed(_seed(self.views.seed, key, view))
            return functional.pil_to_tensor(self._drawn(image))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, C, H, W]``, uint8, as the model takes them, in float32."""
        scaled = pixels.to(torch.float32).div_(255)
        return functional.normalize(scaled, list(self.mean), list(self.std), inplace=True)

    def about(self) -> dict[str, Any]:
        """All that shapes the pixels, and what the model takes of them; JSON."""
        described = asdict(self) | {"views": self.views.model_dump(mode="json")}
        # The libraries whose next version may resample or jitter in another way.
        made_by = versions("pillow", "torchvision")
        return {k: list(v) if isinstance(v, tuple) else v for k, v in described.items()} | made_by

    @cached_property
    def _drawn(self) -> Callable[[Image.Image], Image.Image]:
        views = self.views
        steps: list[Any] = [
            transforms.RandomResizedCrop(
                self.size,
                views.crop_scale,
                interpolation=transforms.InterpolationMode(self.interpolation),
            ),
            transforms.RandomHorizontalFlip(views.flip),
        ]
        if jitter := views.color_jitter:
            factors = jitter.model_dump(exclude={"probability"})
            changed = transforms.ColorJitter(**factors)
            steps.append(transforms.RandomApply([changed], jitter.probability))
        if views.grayscale:
            steps.append(transforms.RandomGrayscale(views.grayscale))
        if views.blur:
            blurred = transforms.GaussianBlur(_BLUR_KERNEL, _BLUR_SIGMA)
            steps.append(transforms.RandomApply([blurred], views.blur))
        if views.solarize:
            steps.append(transforms.RandomSolarize(_SOLARIZE_FROM, views.solarize))
        drawn: Callable[[Image.Image], Image.Image] = transforms.Compose(steps)
        return drawn


def _seed(seed: int, key: str, view: int) -> int:
    digest = hashlib.sha256(f"{seed}/{key}/{view}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
