"""Outputs and transforms of timm models and how their like is built, family by family."""

import pytest
import tiny
import torch
from dgmr import models
from dgmr.mlps import mlps
from PIL import Image
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
    if model.num_classes == 0:
        assert logits is None
    else:
        assert torch.equal(logits, model(images)) and logits.shape == (2, tiny.CLASSES)


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
    for name, mlp in mlps(wider).items():
        packed = 2 if family == "packed" else 1  # timm counts gate and value
        assert packed * mlp.hidden_features == 5 * mlp.in_features, name


def shapes(model: nn.Module):
    return {name: value.shape for name, value in model.state_dict().items()}
