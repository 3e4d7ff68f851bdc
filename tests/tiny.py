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
from dgmr.models import outputs
from dgmr.params import Features
from dgmr.shards import Sample, write_manifest, write_shard
from PIL import Image
from timm.layers import RmsNorm
from torch import nn

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


def registers_vit(**changes):
    return vit(reg_tokens=3, no_embed_class=True, init_values=0.5, **changes)


def swin(**changes):
    """Two stages of one block each: 16 and 32 dimensions."""
    return _windowed("swin_tiny_patch4_window7_224", **changes)


def swin_v2(**changes):
    """As :func:`swin`, with tables of positions that are in no file."""
    return _windowed("swinv2_tiny_window8_256", **changes)


def _windowed(name, **changes):
    stages = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "num_classes": CLASSES}
    window = {"img_size": SIDE, "patch_size": 4, "window_size": 4}
    return build(name, **(stages | window | changes))


def siglip(**changes):
    """No class token, an attention-pool head with an MLP, a ratio that is no whole number, no classifier."""
    small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    small |= {"mlp_ratio": 2.7, "num_classes": 0}
    return build("vit_base_patch16_siglip_224", **(small | changes))


def _narrow(name, **changes):
    """24 dimensions, 2 blocks."""
    small = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return build(name, **(small | {"num_classes": CLASSES} | changes))


def dinov2(**changes):
    """Registers, gate and value of the MLPs in one layer (SwiGLUPacked), no classifier."""
    return _narrow("vit_giant_patch14_reg4_dinov2", **({"num_classes": 0} | changes))


def dinov3(**changes):
    """Rotary embeddings, gate and value apart (SwiGLU) and a multiple of 8 wide, no classifier."""
    wider = {"embed_dim": 32, "num_classes": 0}
    return _narrow("vit_huge_plus_patch16_dinov3", **(wider | changes))


def eva02(**changes):
    """Rotary embeddings, gate and value apart (SwiGLU), an inner norm."""
    return _narrow("eva02_large_patch14_clip_224", **changes)


def eva02_packed(**changes):
    """Rotary embeddings, gate and value in one layer."""
    return _narrow("eva02_tiny_patch14_224", **changes)


def eva_clip(**changes):
    """Norms after the MLPs, a ratio of 8.57."""
    return _narrow("eva02_enormous_patch14_clip_224", **changes)


def intern_vit(**changes):
    return _narrow("vit_intern300m_patch14_448", **changes)


def beit(**changes):
    return _narrow("beit_base_patch16_224", **changes)


FAMILIES = {
    "class token": vit,
    "registers": registers_vit,
    "swin": swin,
    "attention pool": siglip,
    "packed": dinov2,
    "gated": dinov3,
    "gated with norm": eva02,
    "packed, rotary": eva02_packed,
    "norm after": eva_clip,
    "intern_vit": intern_vit,
    "beit": beit,
}


def mask(module, kept):
    """Silence the other hidden units in a timm MLP; its inner norm sees the ``kept`` ones alone."""

    def silence(norm, arguments, _output):
        (hidden,) = arguments
        chosen = _normed(norm, hidden[..., kept], kept)
        return torch.zeros_like(hidden).index_copy(-1, kept, chosen)

    module.norm.register_forward_hook(silence)
    return module


def _normed(norm, hidden, kept):
    if isinstance(norm, nn.Identity):
        return hidden
    if isinstance(norm, RmsNorm):
        return (
            hidden / (hidden.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight[kept]
        )
    hidden = hidden - hidden.mean(-1, keepdim=True)
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return hidden * norm.weight[kept] + norm.bias[kept]


def put_out(module, model, images):
    """What ``module`` of ``model`` puts out."""
    return _seen(module.register_forward_hook, lambda _m, _i, output: output, model, images)


def given(module, model, images):
    """What ``module`` of ``model`` is given."""
    return _seen(module.register_forward_pre_hook, lambda _m, inputs: inputs[0], model, images)


def _seen(register, what, model, images):
    found = []
    # append returns None: a hook that returned a value would change the pass.
    hook = register(lambda *arguments: found.append(what(*arguments)))
    try:
        outputs(model, images)
    finally:
        hook.remove()
    (value,) = found
    return value


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
    calibrated = {"samples": 8, "tokens": 9}
    values = {"views": VIEWS, "calibration": calibrated, "dtype": "float32", "batch_size": 4}
    return Features.model_validate(values | changes)


def write_features(folder, teacher, data, config):
    """The features room ``folder/room``, whose files lie in ``folder/work``."""
    shards = sorted(path.stem for path in data.glob("*.tar"))
    work = folder / "work"
    targets.compute(teacher, data, shards, config, work / "targets")
    calibrated = work / "calibration"
    calibration.compute(teacher, data, config, calibrated)
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
