"""A pruned model is the dense one with the other hidden units silent, and plain timm runs it."""

import random

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.models import mlps, outputs, widths
from dgmr.prune import gram_schmidt_order, prune_model
from dgmr.prune.compensate import Refit

RATIOS = {"class token": 4, "registers": 4, "swin": 4, "attention pool": 86 / 32}


def silence_others(model, ratio):
    """Mask in ``model`` the hidden units that Gram-Schmidt does not keep."""
    for mlp in mlps(model).values():
        width = int(ratio * mlp.fc1.in_features)
        mask = torch.zeros(mlp.fc1.out_features, dtype=mlp.fc1.weight.dtype)
        mask[gram_schmidt_order(mlp.fc1.weight, width)] = 1
        mlp.act.register_forward_hook(lambda _m, _i, hidden, mask=mask: hidden * mask)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pruned_is_the_dense_model_with_units_masked(family):
    draw = random.Random(family)
    largest = RATIOS[family]
    for ratio in [largest, 1, *(draw.uniform(0.1, largest) for _ in range(4))]:
        dense = tiny.FAMILIES[family]().double()
        pruned = prune_model(dense, ratio)
        masked = silence_others(tiny.FAMILIES[family]().double(), ratio)
        images = tiny.pixels().double()
        with torch.inference_mode():
            for found, expected in zip(
                outputs(pruned, images), outputs(masked, images), strict=True
            ):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            difference = (outputs(dense, images).pooled - outputs(pruned, images).pooled).abs()
        assert (difference.max() > 1e-3) == (ratio < largest)


def test_each_block_alone_is_masked():
    dense = tiny.vit().double()
    pruned, masked = prune_model(dense, 1.3), silence_others(tiny.vit().double(), 1.3)
    tokens = torch.randn(3, 17, 32, dtype=torch.double)
    for found, expected in zip(pruned.blocks, masked.blocks, strict=True):
        torch.testing.assert_close(found(tokens), expected(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_timm_loads_a_saved_student_bit_by_bit(tmp_path, family):
    pruned = prune_model(tiny.FAMILIES[family](), 1.3)
    artefact.save(tmp_path / "pruned", pruned, {})
    plain = timm.create_model(f"local-dir:{tmp_path / 'pruned'}", pretrained=True).eval()
    assert torch.equal(plain(tiny.pixels()), pruned(tiny.pixels()))
    assert widths(plain) == widths(pruned)


@pytest.mark.parametrize(
    ("family", "ratio", "expected"),
    [
        ("class token", 1, [32, 32]),
        ("class token", 0.999, [31, 31]),
        ("class token", 1 / 32, [1, 1]),
        ("class token", 4, [128, 128]),
        ("swin", 1.5, [24, 48]),  # a width a stage
        ("attention pool", 2.1, [67, 67]),  # its head's MLP too
    ],
)
def test_widths_are_the_ratio_times_the_dimension(family, ratio, expected):
    pruned = prune_model(tiny.FAMILIES[family](), ratio)
    assert list(widths(pruned).values()) == expected


def test_a_ratio_gives_the_width_that_timm_makes_of_it():
    model = tiny.vit(depth=1, embed_dim=36)
    for width in range(1, 145, 5):
        ratio = width / 36
        assert widths(prune_model(model, ratio)) == {"blocks.0.mlp": int(ratio * 36)}


def test_only_mlps_change():
    dense = tiny.registers_vit()
    pruned = prune_model(dense, 1).state_dict()
    for name, value in dense.state_dict().items():
        if name.endswith(("fc1.weight", "fc1.bias", "fc2.weight")):
            assert pruned[name].shape != value.shape
        else:
            assert torch.equal(pruned[name], value)


def test_given_orders_are_followed_and_may_reach_further():
    dense = tiny.vit()
    orders = {name: torch.arange(127, -1, -1) for name in mlps(dense)}
    for name, mlp in mlps(prune_model(dense, 0.25, orders)).items():
        whole = mlps(dense)[name]
        assert torch.equal(mlp.fc1.weight, whole.fc1.weight[120:].flip(0))
        assert torch.equal(mlp.fc1.bias, whole.fc1.bias[120:].flip(0))
        assert torch.equal(mlp.fc2.weight, whole.fc2.weight[:, 120:].flip(1))
        assert torch.equal(mlp.fc2.bias, whole.fc2.bias)


def test_refits_stand_in_for_fc2():
    dense = tiny.vit()
    refits = {name: Refit(torch.randn(32, 16), torch.randn(32), 0.0, 0.0) for name in mlps(dense)}
    plain = mlps(prune_model(dense, 0.5))
    for name, mlp in mlps(prune_model(dense, 0.5, refits=refits)).items():
        assert torch.equal(mlp.fc1.weight, plain[name].fc1.weight)
        assert torch.equal(mlp.fc2.weight, refits[name].weight)
        assert torch.equal(mlp.fc2.bias, refits[name].bias)


def test_teacher_is_left_as_it_is_and_shares_nothing():
    dense = tiny.vit()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    pruned = prune_model(dense, 4)
    tiny.perturb(pruned, 1.0)
    assert widths(dense) == {"blocks.0.mlp": 128, "blocks.1.mlp": 128}
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_student_takes_mode_and_precision_of_the_teacher(training, dtype):
    pruned = prune_model(tiny.vit().to(dtype).train(training), 1)
    assert pruned.training == training
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}


@pytest.mark.parametrize("ratio", [4.01, 1 / 33, 0, -1, float("nan")])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(DgmrError, match=f"prune.ratio is {ratio}, .* from 0.0312 to 4"):
        prune_model(tiny.vit(), ratio)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_giant_patch14_dinov2", r"blocks\.0\.mlp is a GluMlp"),
        ("eva02_base_patch14_224", r"blocks\.0\.mlp is a SwiGLU"),
        ("convnext_atto", r"stages\.0\.blocks\.0\.mlp is an MLP with .* convolutions"),
        ("resnet18", "no timm Mlp blocks"),
    ],
)
def test_unsupported_mlps_are_refused_by_name(name, said):
    with torch.device("meta"):
        model = timm.create_model(name, **({"depth": 1} if "patch" in name else {}))
    with pytest.raises(DgmrError, match=rf"{name}\b.*{said}"):
        prune_model(model, 1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}),
        ("cait_xxs24_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    ],
    ids=["no mlp_ratio at all", "mlp_ratio of some blocks"],
)
def test_families_that_mlp_ratio_does_not_shape_are_refused(name, arguments):
    model = timm.create_model(name, **arguments)
    with pytest.raises(DgmrError, match=f"timm does not build {type(model).__name__} with mlp_ra"):
        prune_model(model, 1)


def test_mlps_without_biases_stay_so():
    pruned = prune_model(tiny.vit(proj_bias=False).double(), 1.3)
    masked = silence_others(tiny.vit(proj_bias=False).double(), 1.3)
    assert all(mlp.fc1.bias is mlp.fc2.bias is None for mlp in mlps(pruned).values())
    images = tiny.pixels().double()
    torch.testing.assert_close(pruned(images), masked(images), rtol=0, atol=1e-10)
