"""Outputs, MLPs and transforms of timm models, family by family."""

from functools import partial

import pytest
import timm
import tiny
import torch
from dgmr import models
from dgmr.errors import DgmrError
from PIL import Image
from timm.layers import Mlp, SwiGLUPacked
from torch import nn


def test_outputs_of_a_class_token_are_the_normed_tokens():
    model = tiny.registers_vit()
    images = tiny.pixels()
    seen = {}
    model.norm.register_forward_hook(lambda _m, _i, output: seen.update(tokens=output))
    found = models.outputs(model, images)
    assert seen["tokens"].shape == (2, 1 + 3 + 16, 32)
    assert torch.equal(found.pooled, seen["tokens"][:, 0])
    assert torch.equal(found.patch_tokens, seen["tokens"][:, 4:])


def test_outputs_without_class_token_pool_all_tokens():
    model = tiny.vit(class_token=False, global_pool="avg", fc_norm=False)
    found = models.outputs(model, tiny.pixels())
    assert found.patch_tokens.shape == (2, 16, 32)
    torch.testing.assert_close(found.pooled, found.patch_tokens.mean(1))


def test_outputs_of_swin_flatten_its_grid_row_by_row():
    model = tiny.swin()
    found = models.outputs(model, tiny.pixels())
    grid = model.forward_features(tiny.pixels())
    assert grid.shape == (2, 4, 4, 32) and found.patch_tokens.shape == (2, 16, 32)
    assert torch.equal(found.patch_tokens[:, 6], grid[:, 1, 2])
    torch.testing.assert_close(found.pooled, grid.mean((1, 2)))


def test_outputs_of_an_attention_pool_are_the_pool():
    model = tiny.siglip()
    found = models.outputs(model, tiny.pixels())
    assert torch.equal(found.pooled, model.attn_pool(found.patch_tokens))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_the_model_s(family):
    model = tiny.FAMILIES[family]()
    images = tiny.pixels()
    found, logits = models.outputs_and_logits(model, images)
    assert all(map(torch.equal, found, models.outputs(model, images)))
    if family == "attention pool":
        assert logits is None
    else:
        assert torch.equal(logits, model(images)) and logits.shape == (2, tiny.CLASSES)


@pytest.mark.parametrize(
    ("family", "expected"),
    {
        "class token": {"blocks.0.mlp": 128, "blocks.1.mlp": 128},
        "swin": {"layers.0.blocks.0.mlp": 64, "layers.1.blocks.0.mlp": 128},
        "attention pool": {"blocks.0.mlp": 86, "attn_pool.mlp": 86},
    }.items(),
)
def test_widths_of_every_mlp_in_order(family, expected):
    model = tiny.FAMILIES[family]()
    assert list(models.widths(model).items()) == list(expected.items())
    assert all(model.get_submodule(name) is mlp for name, mlp in models.mlps(model).items())


def test_largest_ratio_is_the_first_to_be_whole():
    assert models.largest_ratio(tiny.vit()) == 4
    assert models.largest_ratio(tiny.siglip()) == 86 / 32
    model = tiny.vit()
    model.blocks[1].mlp = Mlp(32, 48)
    assert models.largest_ratio(model) == 1.5


class OtherMlp(Mlp):
    """An Mlp by ``isinstance``, but who knows what it computes."""


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("vit_tiny_patch16_224", {"mlp_layer": SwiGLUPacked}, r"blocks\.0\.mlp is a GluMlp"),
        ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.GluMlp}, r"blocks\.0\.mlp is a GluMlp"),
        ("vit_tiny_patch16_224", {"mlp_layer": OtherMlp}, r"blocks\.0\.mlp is a OtherMlp"),
        ("eva02_base_patch14_224", {}, r"eva02_base_patch14_224: blocks\.0\.mlp is a SwiGLU"),
        ("vit_giant_patch14_dinov2", {}, r"vit_giant_patch14_dinov2: blocks\.0\.mlp is a GluMlp"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, r"blocks\.0\.mlp .* inner norm"),
        ("convnext_atto", {}, r"convnext_atto: stages\.0\.blocks\.0\.mlp .* convolutions"),
        ("resnet18", {}, "resnet18 has no timm Mlp blocks"),
    ],
)
def test_other_mlps_are_refused_by_name(name, arguments, said):
    if not name.startswith(("conv", "res")):
        arguments = arguments | {"depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    with pytest.raises(DgmrError, match=said):
        models.mlps(model)


def test_recorded_inputs_are_those_of_fc1_and_of_the_last_pass():
    for model in (tiny.vit(), tiny.swin(), tiny.siglip()):
        seen = {}
        for name, mlp in models.mlps(model).items():
            mlp.fc1.register_forward_pre_hook(partial(_keep, seen, name))
        with models.recorded_mlp_inputs(model) as inputs:
            model(tiny.pixels(seed=1))
            model(tiny.pixels(3))
            assert inputs.keys() == models.mlps(model).keys()
            for name, value in inputs.items():
                assert value.ndim == 3 and len(value) == 3
                assert torch.equal(value, seen[name].reshape(value.shape))
                assert not value.requires_grad


def _keep(seen, name, _module, arguments):
    seen[name] = arguments[0]


def test_recording_ends_with_its_block_even_by_an_error():
    model = tiny.vit()
    with pytest.raises(KeyError), models.recorded_mlp_inputs(model) as inputs:
        raise KeyError
    model(tiny.pixels())
    assert not inputs


def test_evaluation_transform_and_size_are_the_model_s_own():
    model = tiny.vit()
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)}
    found = models.evaluation_transform(model)(Image.new("RGB", (50, 40), (51, 102, 255)))
    assert found.shape == models.input_size(model) == (3, tiny.SIDE, tiny.SIDE)
    torch.testing.assert_close(found.mean((1, 2)), torch.tensor([0.2, 0.8, 0.7]))
    assert found.flatten(1).std(1).max() < 1e-6


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_like_builds_the_same_with_other_weights(family):
    model = tiny.FAMILIES[family]()
    again = models.like(model)
    assert shapes(again) == shapes(model)
    assert again.pretrained_cfg == model.pretrained_cfg
    again.load_state_dict(model.state_dict())
    again.eval()
    assert torch.equal(again(tiny.pixels()), model(tiny.pixels()))
    wider = models.like(model, mlp_ratio=5)
    assert all(
        mlp.fc1.out_features == 5 * mlp.fc1.in_features for mlp in models.mlps(wider).values()
    )


def shapes(model: nn.Module):
    return {name: value.shape for name, value in model.state_dict().items()}
