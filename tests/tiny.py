"""Models, shards and rooms small enough to be made in a moment; plain functions and their fixtures.

A test room's ``conftest.py`` imports the fixtures it needs.
"""

import io

import numpy as np
import pytest
import timm
import torch
from dgmr import artefact
from dgmr.features import calibration, publish, targets
from dgmr.params import Features
from dgmr.shards import Sample, write_manifest, write_shard
from PIL import Image

SIDE = 32
CLASSES = 10
ABOUT = {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}
COUNTS = (5, 0, 4)  # one shard is empty
VIEWS = {"count": 2, "seed": 3, "crop_scale": (0.5, 1.0)}


def build(name, seed=0, **arguments):
    """A timm model whose every parameter is random, biases and scales too, so that all of them matter."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained_cfg_overlay=ABOUT, **arguments).eval()
    return perturb(model, 0.1)


def perturb(model, scale, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def vit(seed=0, **changes):
    """A ViT with a class token: 32 dimensions, 2 blocks of 128 hidden neurons, 17 tokens."""
    arguments = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return build("vit_tiny_patch16_224", seed, **(arguments | {"num_classes": CLASSES} | changes))


def registers_vit():
    return vit(reg_tokens=3, no_embed_class=True, init_values=0.5)


def swin():
    """Two stages of one block each: 16 and 32 dimensions."""
    stages = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}
    window = {"img_size": SIDE, "patch_size": 4, "window_size": 4}
    return build("swin_tiny_patch4_window7_224", num_classes=CLASSES, **stages, **window)


def siglip():
    """No class token, an attention-pool head with an MLP, a ratio that is no whole number, no classifier."""
    small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return build("vit_base_patch16_siglip_224", mlp_ratio=2.7, num_classes=0, **small)


FAMILIES = {"class token": vit, "registers": registers_vit, "swin": swin, "attention pool": siglip}


def pixels(count=2, seed=0):
    """Random normalised images ``[count, 3, SIDE, SIDE]``."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def image(index):
    """A picture of its own size and colours."""
    draw = np.random.default_rng(index)
    coarse = draw.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40 + index, 36), Image.Resampling.BICUBIC)


def write_data(folder, counts=COUNTS, labels=None, first=0):
    """Shards of ``counts`` pictures, the first of which is ``image(first)``."""
    folder.mkdir(parents=True)
    written, index = [], 0
    for number, count in enumerate(counts):
        samples = []
        for _ in range(count):
            buffer = io.BytesIO()
            image(first + index).save(buffer, "PNG")
            label = None if labels is None else int(labels[index])
            samples.append(Sample(f"sample-{index}", buffer.getvalue(), "png", label))
            index += 1
        written.append(write_shard(folder, f"{number:05d}", samples))
    write_manifest(folder, written)
    return folder


def write_teacher(folder, model=None):
    artefact.save(folder, vit() if model is None else model, {"stage": "teacher"})
    return folder


def features_config(**changes):
    calibrated = {"samples": 6, "tokens": 9}
    values = {"views": VIEWS, "calibration": calibrated, "dtype": "float32", "batch_size": 4}
    return Features.model_validate(values | changes)


def write_features(folder, teacher, data, config):
    """The features room ``folder/room``, whose files lie in ``folder/work``."""
    shards = sorted(path.stem for path in data.glob("*.tar"))
    work = folder / "work"
    targets.compute(teacher, data, shards, config, work / "targets")
    calibrated = work / "calibration"
    calibration.compute(teacher, data, config.calibration, config.batch_size, calibrated)
    publish.publish(teacher, [work / "targets"], calibrated, config, folder / "room")
    return folder / "room"


def damage(path):
    """Change one bit in the last byte; the size stays."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def features(tmp_path_factory, teacher, data):
    return write_features(tmp_path_factory.mktemp("tiny"), teacher, data, features_config())
