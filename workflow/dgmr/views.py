"""Views of a training image: random crops and flips that are a pure function of (seed, key, view).

The teacher's targets are cached for a (sample, view), and the student must see the very same pixels
later, in another process; so nothing here draws from a global random state.
"""

import hashlib
from dataclasses import dataclass

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as transforms

from dgmr.params import Views


@dataclass(frozen=True)
class ViewTransform:
    """PIL image to normalised ``[C, H, W]``, cropped and flipped as (key, view) says."""

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
            top, left, height, width = RandomResizedCrop.get_params(
                image, list(self.views.crop_scale), [3 / 4, 4 / 3]
            )
            flipped = bool(torch.rand(()) < self.views.flip)
        crop = transforms.resized_crop(
            image, top, left, height, width, list(self.size), InterpolationMode(self.interpolation)
        )
        if flipped:
            crop = transforms.hflip(crop)
        return transforms.normalize(transforms.to_tensor(crop), list(self.mean), list(self.std))


def _seed(seed: int, key: str, view: int) -> int:
    digest = hashlib.sha256(f"{seed}/{key}/{view}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
