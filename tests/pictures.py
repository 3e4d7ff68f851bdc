"""Pictures that tests make up, and their bytes."""

import io

import numpy as np
from PIL import Image


def picture(seed=0, size=(40, 30), mode="RGB"):
    """Smooth random colours, so that JPEG keeps them nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image=None, format="PNG", **options):
    """A picture's bytes."""
    buffer = io.BytesIO()
    (picture() if image is None else image).save(buffer, format, **options)
    return buffer.getvalue()
