"""A pruned model is the dense one with the other hidden units silent, and plain timm runs it."""

import random

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.mlps import mlps, widths
from dgmr.models import like, outputs
from dgmr.prune import gram_schmidt_order, prune_model
from dgmr.prune.model import Refit, build, check_widths, pruned_tensors

FAMILIES = tiny.FAMILIES | {"swin v2": tiny.swin_v2}


def silence_others(model, hidden_features):
    """Mask in ``model`` the hidden units that Gram-Schmidt does not keep."""
    for name, mlp in mlps(model).items():
        vectors = mlp.vectors(mlp.module.state_dict())
        if hidden_features[name] < mlp.hidden_features:
            tiny.mask(mlp.module, gram_schmidt_order(vectors, hidden_features[name]))
    return model


def largest_ratio(model):
    return min(mlp.hidden_features / mlp.in_features for mlp in mlps(model).values())


def drawn(model, seed):
    """Another width for every MLP."""
    draw = random.Random(seed)
    return {name: draw.randint(2, width) for name, width in widths(model).items()}


def by_ratio(model, ratio):
    return {name: int(ratio * mlp.in_features) for name, mlp in mlps(model).items()}


@torch.inference_mode()
def assert_masked(build_dense, wanted, **how):
    dense, images = build_dense().double(), tiny.pixels().double()
    pruned = prune_model(dense, **how)
    assert widths(pruned) == wanted
    masked = silence_others(build_dense().double(), wanted)
    for found, expected in zip(outputs(pruned, images), outputs(masked, images), strict=True):
        assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    difference = (outputs(dense, images).pooled - outputs(pruned, images).pooled).abs().max()
    assert (difference > 1e-4) == (wanted != widths(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_is_the_dense_model_with_units_masked(family):
    draw = random.Random(family)
    model = FAMILIES[family]()
    largest = largest_ratio(model)
    for ratio in [largest, draw.uniform(0.15, largest)]:
        assert_masked(FAMILIES[family], by_ratio(model, ratio), ratio=ratio)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_with_another_width_in_every_mlp(family):
    wanted = drawn(FAMILIES[family](), seed=0)
    assert len(set(wanted.values())) > 1
    assert_masked(FAMILIES[family], wanted, hidden_features=wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_alone_is_masked(family):
    dense, masked = FAMILIES[family]().double(), FAMILIES[family]().double()
    wanted = by_ratio(dense, 1.3)
    pruned = prune_model(dense, 1.3)
    silence_others(masked, wanted)
    for name, mlp in mlps(pruned).items():
        tokens = torch.randn(3, 17, mlp.in_features, dtype=torch.double)
        expected = masked.get_submodule(name)(tokens)
        assert (mlp.module(tokens) - expected).abs().max() <= 1e-10 * expected.abs().max()
        assert (dense.get_submodule(name)(tokens) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_saved_students_are_loaded_bit_by_bit(tmp_path, family):
    dense = FAMILIES[family]()
    for name, hidden_features in {"even": by_ratio(dense, 1.25), "uneven": drawn(dense, 5)}.items():
        pruned = prune_model(dense, hidden_features=hidden_features)
        artefact.save(tmp_path / name, pruned, {})
        if name == "even":
            assert not (tmp_path / name / "loader.py").exists()
            loaded = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        else:
            assert (tmp_path / name / "loader.py").exists()
            loaded = artefact.load(tmp_path / name)
        assert torch.equal(loaded(tiny.pixels()), pruned(tiny.pixels()))
        assert widths(loaded) == hidden_features


def test_all_units_are_the_dense_model_bit_by_bit():
    for family in FAMILIES.values():
        dense = family()
        pruned = prune_model(dense, hidden_features=widths(dense))
        assert torch.equal(pruned(tiny.pixels()), dense(tiny.pixels()))


# Widths


def is_plain(model):
    """Whether timm builds the same from the model's own arguments."""
    plain = like(model).state_dict()
    return {name: tensor.shape for name, tensor in plain.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def on_meta(name, **arguments):
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def assert_built(model, hidden_features):
    with torch.device("meta"):
        built = build(model, hidden_features)
        assert widths(built) == hidden_features
        assert is_plain(built), hidden_features


NARROW = {"embed_dim": 24, "num_heads": 2}
UNIFORM = [
    ("vit_tiny_patch16_224", NARROW),
    ("vit_tiny_patch16_224", {"embed_dim": 35, "num_heads": 5, "mlp_ratio": 2.9}),
    ("vit_tiny_patch16_224", {"embed_dim": 96, "num_heads": 2}),
    ("vit_tiny_patch16_224", {"embed_dim": 1408, "num_heads": 2}),
    ("vit_base_patch16_siglip_224", NARROW | {"mlp_ratio": 3.7362}),
    ("vit_giant_patch14_reg4_dinov2", NARROW),
    ("vit_giant_patch14_reg4_dinov2", {}),
    ("eva02_tiny_patch14_224", NARROW),
    ("eva02_large_patch14_clip_224", NARROW),
    ("eva02_enormous_patch14_clip_224", {}),
]


def assert_uniform_widths_are_built(name, arguments, most):
    """All widths where there are no more than ``most``, else as many, drawn."""
    model = on_meta(name, depth=1, img_size=28, patch_size=14, **arguments)
    largest = min(widths(model).values())
    draw = random.Random(f"{name} {arguments}")
    others = range(2, largest)
    for width in [1, largest, *draw.sample(others, min(most, len(others)))]:
        assert_built(model, dict.fromkeys(widths(model), width))


@pytest.mark.parametrize(("name", "arguments"), UNIFORM)
def test_a_width_for_all_mlps_is_one_that_plain_timm_builds(name, arguments):
    assert_uniform_widths_are_built(name, arguments, most=3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), UNIFORM)
def test_every_width_for_all_mlps_is_one_that_plain_timm_builds(name, arguments):
    assert_uniform_widths_are_built(name, arguments, most=100)


def assert_ratios_are_built(dim, ratios):
    """Of a ratio, Swin's stages make widths that are no fixed multiples of each other."""
    small = {"embed_dim": dim, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    model = on_meta("swin_tiny_patch4_window7_224", img_size=32, **small)
    for ratio in ratios:
        assert_built(model, by_ratio(model, ratio))


@pytest.mark.parametrize("dim", [16, 36])
def test_a_ratio_of_swin_is_one_that_plain_timm_builds(dim):
    draw = random.Random(dim)
    assert_ratios_are_built(dim, [0.3, 1.1, 4, *(draw.uniform(0.1, 4) for _ in range(3))])


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 24, 36])
def test_every_ratio_of_swin_is_one_that_plain_timm_builds(dim):
    # Twice as fine as the first stage's widths: all that the second's can be.
    assert_ratios_are_built(dim, [(half + 0.25) / (2 * dim) for half in range(2, 8 * dim)])


def test_widths_of_no_ratio_are_fitted():
    for model in (tiny.vit(), tiny.swin(), tiny.dinov2(), tiny.eva02()):
        wanted = {name: 3 + 2 * index for index, name in enumerate(widths(model))}
        with torch.device("meta"):
            built = build(model, wanted)
            assert not is_plain(built)
        assert widths(built) == wanted


def test_widths_that_timm_aligns_are_fitted():
    """DINOv3's SwiGLU comes in multiples of 8."""
    model = tiny.dinov3()
    for width in (40, 41, 48, 55):
        built = build(model, dict.fromkeys(widths(model), width))
        assert set(widths(built).values()) == {width}
        assert is_plain(built) == (width % 8 == 0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}),
        (
            "cait_xxs24_224",
            {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": tiny.SIDE, "patch_size": 8},
        ),
    ],
    ids=["no mlp_ratio at all", "mlp_ratio of some blocks"],
)
def test_families_that_mlp_ratio_does_not_shape_are_fitted(tmp_path, name, arguments):
    dense = tiny.build(name, num_classes=tiny.CLASSES, **arguments)
    pruned = prune_model(dense, 1.5)
    assert widths(pruned) == by_ratio(dense, 1.5)
    artefact.save(tmp_path / "pruned", pruned, {})
    loaded = artefact.load(tmp_path / "pruned")
    assert torch.equal(loaded(tiny.pixels()), pruned(tiny.pixels()))


@pytest.mark.parametrize(
    ("family", "ratio", "expected"),
    [
        ("class token", 1, [32, 32]),
        ("class token", 0.999, [31, 31]),
        ("class token", 1 / 32, [1, 1]),
        ("class token", 4, [128, 128]),
        ("swin", 1.5, [24, 48]),  # a width a stage
        ("swin", 0.3, [4, 9]),
        ("attention pool", 2.1, [67, 67]),  # its head's MLP too
        ("packed", 1.3, [31, 31]),
    ],
)
def test_widths_are_the_ratio_times_the_dimension(family, ratio, expected):
    pruned = prune_model(tiny.FAMILIES[family](), ratio)
    assert list(widths(pruned).values()) == expected


@pytest.mark.parametrize(("ratio", "width"), [(4.04, 129), (1 / 33, 0), (0, 0), (-1, -32)], ids=str)
def test_impossible_ratios_are_refused(ratio, width):
    with pytest.raises(DgmrError) as error:
        prune_model(tiny.vit(), ratio)
    assert str(error.value) == (
        f"prune: blocks.0.mlp would keep {width} hidden units, but it has 128 (4 times its embed"
        " dim): choose a width from 1 to 128."
    )


def test_impossible_widths_are_refused_by_name():
    model = tiny.siglip()
    for width in (0, 87):
        with pytest.raises(DgmrError, match=rf"attn_pool\.mlp would keep {width} .* from 1 to 86"):
            check_widths(mlps(model), {"blocks.0.mlp": 86, "attn_pool.mlp": width})
    check_widths(mlps(model), {"blocks.0.mlp": 86, "attn_pool.mlp": 1})


def test_either_a_ratio_or_widths_must_be_given():
    model = tiny.vit()
    for both in ({}, {"ratio": 4, "hidden_features": widths(model)}):
        with pytest.raises(ValueError, match="either ratio or hidden_features"):
            prune_model(model, **both)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "resnet18"])
def test_unsupported_models_are_refused_by_name(name):
    with pytest.raises(DgmrError, match=rf"^{name}\b"):
        prune_model(on_meta(name), 1)


# Weights


@pytest.mark.parametrize("family", ["registers", "packed", "gated with norm"])
def test_only_hidden_units_change(family):
    dense = tiny.FAMILIES[family]()
    pruned = prune_model(dense, 1).state_dict()
    for name, value in dense.state_dict().items():
        if ".mlp." in name and not name.endswith("fc2.bias"):
            assert pruned[name].shape != value.shape
        else:
            assert torch.equal(pruned[name], value)


def test_given_orders_are_followed_and_may_reach_further():
    dense = tiny.vit()
    orders = {name: torch.arange(127, -1, -1) for name in mlps(dense)}
    for name in mlps(dense):
        mlp = prune_model(dense, 0.25, orders=orders).get_submodule(name)
        whole = dense.get_submodule(name)
        assert torch.equal(mlp.fc1.weight, whole.fc1.weight[120:].flip(0))
        assert torch.equal(mlp.fc1.bias, whole.fc1.bias[120:].flip(0))
        assert torch.equal(mlp.fc2.weight, whole.fc2.weight[:, 120:].flip(1))
        assert torch.equal(mlp.fc2.bias, whole.fc2.bias)


def test_orders_of_packed_units_take_gate_and_value():
    dense = tiny.dinov2()
    orders = {name: torch.randperm(64) for name in mlps(dense)}
    pruned = prune_model(dense, hidden_features=dict.fromkeys(orders, 10), orders=orders)
    for name, order in orders.items():
        mlp, whole = pruned.get_submodule(name), dense.get_submodule(name)
        for place, unit in enumerate(order[:10].tolist()):
            assert torch.equal(mlp.fc1.weight[place], whole.fc1.weight[unit])
            assert torch.equal(mlp.fc1.weight[10 + place], whole.fc1.weight[64 + unit])
            assert torch.equal(mlp.fc1.bias[10 + place], whole.fc1.bias[64 + unit])
            assert torch.equal(mlp.fc2.weight[:, place], whole.fc2.weight[:, unit])


def test_refits_stand_in_for_fc2():
    dense = tiny.vit()
    refits = {name: Refit(torch.randn(32, 16), torch.randn(32)) for name in mlps(dense)}
    plain, refitted = prune_model(dense, 0.5), prune_model(dense, 0.5, refits=refits)
    for name, refit in refits.items():
        mlp = refitted.get_submodule(name)
        assert torch.equal(mlp.fc1.weight, plain.get_submodule(name).fc1.weight)
        assert torch.equal(mlp.fc2.weight, refit.weight)
        assert torch.equal(mlp.fc2.bias, refit.bias)


def test_refits_of_an_fc2_without_bias_have_none():
    dense = tiny.vit(proj_bias=False)
    refits = {"blocks.1.mlp": Refit(torch.randn(32, 16), None)}
    refitted, plain = prune_model(dense, 0.5, refits=refits), prune_model(dense, 0.5)
    assert torch.equal(refitted.blocks[1].mlp.fc2.weight, refits["blocks.1.mlp"].weight)
    assert torch.equal(refitted.blocks[0].mlp.fc2.weight, plain.blocks[0].mlp.fc2.weight)


def test_tensors_of_mlps_with_like_names_are_told_apart():
    """blocks.1 is no prefix of blocks.10."""
    dense = tiny.vit(depth=11)
    kept = {"blocks.1.mlp": torch.tensor([5]), "blocks.10.mlp": torch.tensor([7, 6])}
    found = dict(pruned_tensors(dense.state_dict().items(), mlps(dense), kept, {}))
    assert list(found) == list(dense.state_dict())
    for index, block in enumerate(dense.blocks):
        expected = block.mlp.fc1.weight[{1: [5], 10: [7, 6]}.get(index, slice(None))]
        assert torch.equal(found[f"blocks.{index}.mlp.fc1.weight"], expected)


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


def test_mlps_without_biases_stay_so():
    def bare():
        return tiny.vit(proj_bias=False)

    pruned = prune_model(bare(), 1.3)
    assert all(mlp.module.fc1.bias is mlp.module.fc2.bias is None for mlp in mlps(pruned).values())
    assert_masked(bare, by_ratio(bare(), 1.3), ratio=1.3)
