"""Hidden units of every kind of MLP: which tensors are theirs, and that dropping is masking."""

import copy
import random
from functools import partial

import pytest
import timm
import tiny
import torch
from dgmr.errors import DgmrError
from dgmr.mlps import PrunableMlp, blocks, mlps, recorded_mlp_inputs, widths
from dgmr.models import like
from timm.layers import ConvMlp, GatedMlp, GluMlp, Mlp, RmsNorm, SwiGLU, SwiGLUPacked
from torch import nn

FAMILIES = tiny.FAMILIES | {"swin v2": tiny.swin_v2}

# With N and M given they make a module; a packed one counts gate and value as hidden features.
KINDS = {
    "plain": Mlp,
    "plain, no bias": partial(Mlp, bias=False),
    "plain, bias of fc2 alone": partial(Mlp, bias=(False, True)),
    "plain with norm": partial(Mlp, norm_layer=nn.LayerNorm),
    "packed, gate first": SwiGLUPacked,
    "packed, gate last": GluMlp,
    "packed, no bias": partial(SwiGLUPacked, bias=False),
    "packed, gate last, bias of fc1 alone": partial(GluMlp, bias=(True, False)),
    "packed with norm": partial(SwiGLUPacked, norm_layer=nn.LayerNorm),
    "packed, gate last, with RMS norm": partial(GluMlp, norm_layer=RmsNorm),
    "gated": SwiGLU,
    "gated, no bias": partial(SwiGLU, bias=False),
    "gated with norm": partial(SwiGLU, norm_layer=nn.LayerNorm),
    "gated with RMS norm, no bias": partial(SwiGLU, norm_layer=RmsNorm, bias=False),
}
EACH = 22  # 14 kinds: 308 random widths in all


def made(kind, n, m, seed=0):
    """An MLP in float64, of which every parameter is random."""
    torch.manual_seed(seed)
    packed = 2 if kind.startswith("packed") else 1
    module = KINDS[kind](n, packed * m).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return PrunableMlp(module)


@torch.inference_mode()
def error(module, mlp, kept):
    """Largest difference between ``module`` and the dense ``mlp`` masked, in units of its output."""
    inputs = torch.randn(2, 5, mlp.in_features, dtype=torch.double)
    expected = tiny.mask(copy.deepcopy(mlp.module), kept)(inputs)
    return float((module(inputs) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_hidden_units_is_masking_them(kind):
    draw = random.Random(kind)
    for seed in range(EACH):
        n, m = draw.randint(1, 40), draw.randint(2, 90)
        # A norm over one unit alone is nothing but its bias.
        kept = torch.tensor(draw.sample(range(m), draw.randint(2, m)))
        mlp = made(kind, n, m, seed)
        pruned = mlp.pruned(kept)
        assert pruned.hidden_features == len(kept)
        assert error(pruned.module, mlp, kept) <= 1e-10
        if len(kept) < m:
            assert error(mlp.module, mlp, kept) > 1e-6


@pytest.mark.parametrize("width", [1, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_one_unit_and_all_units_are_masking_too(kind, width):
    mlp = made(kind, 6, 12)
    kept = torch.randperm(12)[:width]
    assert error(mlp.pruned(kept).module, mlp, kept) <= 1e-10


@pytest.mark.parametrize(
    ("kind", "tensor", "rows"),
    [
        ("packed, gate first", "fc1.weight", lambda kept: [r for j in kept for r in (j, j + 1)]),
        ("packed, gate last", "fc1.bias", lambda kept: [*(2 * kept), *(2 * kept + 1)]),
        ("packed, gate first", "fc1.weight", lambda kept: [*(kept + 12), *kept]),
        ("packed with norm", "norm.weight", lambda kept: [*kept.sort().values]),
        ("plain", "fc1.bias", lambda kept: range(len(kept))),
        ("plain with norm", "norm.bias", lambda kept: range(len(kept))),
        ("gated", "fc1_x.weight", lambda kept: [*kept.flip(0)]),
    ],
)
def test_a_wrong_slice_would_be_noticed(kind, tensor, rows):
    """The comparison itself: it sees packed rows taken side by side, say, rather than M apart."""
    mlp, kept = made(kind, 6, 12), torch.tensor([7, 2, 9, 4])
    pruned = mlp.pruned(kept).module
    assert error(pruned, mlp, kept) <= 1e-10
    wrong = mlp.module.state_dict()[tensor][torch.tensor(list(rows(kept)))]
    pruned.load_state_dict({tensor: wrong}, strict=False)
    assert error(pruned, mlp, kept) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_dense_mlp_is_left_as_it_is_and_shares_nothing(kind):
    mlp = made(kind, 6, 12)
    before = copy.deepcopy(mlp.module.state_dict())
    pruned = mlp.pruned(torch.arange(12))
    tiny.perturb(pruned.module, 1.0)
    mlp.pruned(torch.tensor([3, 1]))
    assert mlp.hidden_features == 12
    for name, tensor in mlp.module.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, pruned.module.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_an_mlp(kind):
    for mlp in (made(kind, 6, 12), PrunableMlp(made(kind, 6, 12).module.to("meta"))):
        assert (mlp.in_features, mlp.hidden_features, mlp.out_features) == (6, 12, 6)
        assert mlp.has_norm == ("norm" in kind)
        assert mlp.has_bias == ("no bias" not in kind and "bias of fc1 alone" not in kind)
        assert not mlp.in_pool_head


@pytest.mark.parametrize("kind", KINDS)
def test_unit_parameters_are_what_one_unit_less_saves(kind):
    def parameters(m):
        return sum(parameter.numel() for parameter in made(kind, 6, m).module.parameters())

    mlp = made(kind, 6, 12)
    assert mlp.unit_parameters == parameters(12) - parameters(11)
    assert PrunableMlp(mlp.module.to("meta")).unit_parameters == parameters(12) - parameters(11)


def test_inputs_and_outputs_may_differ():
    mlp = PrunableMlp(Mlp(6, 12, 4).double())
    assert (mlp.in_features, mlp.out_features) == (6, 4)
    assert mlp.unit_parameters == 6 + 1 + 4
    kept = torch.tensor([8, 3, 5])
    assert error(mlp.pruned(kept).module, mlp, kept) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_the_rows_of_each_unit(kind):
    mlp = made(kind, 6, 12)
    tensors = mlp.module.state_dict()
    found = mlp.vectors({name: tensors[name] for name in mlp.vector_tensors})
    if kind.startswith("plain"):
        expected = [tensors["fc1.weight"][unit] for unit in range(12)]
    elif kind.startswith("packed"):
        rows = tensors["fc1.weight"]
        expected = [torch.cat([rows[unit], rows[12 + unit]]) for unit in range(12)]
    else:
        gate, value = tensors["fc1_g.weight"], tensors["fc1_x.weight"]
        expected = [torch.cat([gate[unit], value[unit]]) for unit in range(12)]
    assert torch.equal(found, torch.stack(expected))
    assert all(name.startswith("fc1") and name.endswith("weight") for name in mlp.vector_tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_is_what_enters_fc2(kind):
    mlp = made(kind, 6, 12)
    inputs = torch.randn(7, 6, dtype=torch.double)
    seen = []
    mlp.module.fc2.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0]))
    output = mlp.module(inputs)
    hidden = mlp.hidden(inputs)
    assert len(seen) == 1, "fc2 ran"
    assert hidden.shape == (7, 12) and torch.equal(hidden, seen[0])
    assert torch.equal(mlp.output(hidden), output)
    assert torch.equal(mlp.module(inputs), output)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_sliced_one_by_one_as_all_together(kind):
    mlp, kept = made(kind, 6, 12), torch.tensor([5, 11, 0])
    whole = mlp.sliced(mlp.module.state_dict(), kept)
    for name, tensor in mlp.module.state_dict().items():
        assert torch.equal(mlp.sliced({name: tensor}, kept)[name], whole[name])
        assert mlp.sliced({name: tensor.to("meta")}, kept)[name].shape == whole[name].shape


# Models


WIDTHS = {
    "class token": {"blocks.0.mlp": 128, "blocks.1.mlp": 128},
    "swin": {"layers.0.blocks.0.mlp": 64, "layers.1.blocks.0.mlp": 128},
    "swin v2": {"layers.0.blocks.0.mlp": 64, "layers.1.blocks.0.mlp": 128},
    "attention pool": {"blocks.0.mlp": 86, "attn_pool.mlp": 86},
    "packed": {"blocks.0.mlp": 64, "blocks.1.mlp": 64},
    "packed, rotary": {"blocks.0.mlp": 64, "blocks.1.mlp": 64},
    "gated": {"blocks.0.mlp": 128, "blocks.1.mlp": 128},
    "gated with norm": {"blocks.0.mlp": 64, "blocks.1.mlp": 64},
    "norm after": {"blocks.0.mlp": 205, "blocks.1.mlp": 205},  # int(24 * 15360 / 1792)
    "intern_vit": {"blocks.0.mlp": 96, "blocks.1.mlp": 96},
    "beit": {"blocks.0.mlp": 96, "blocks.1.mlp": 96},
}


@pytest.mark.parametrize(("family", "expected"), WIDTHS.items())
def test_widths_of_every_mlp_in_order(family, expected):
    model = FAMILIES[family]()
    assert list(widths(model).items()) == list(expected.items())
    assert all(model.get_submodule(name) is mlp.module for name, mlp in mlps(model).items())


KIND = {
    "packed": (GluMlp, False),
    "packed, rotary": (GluMlp, False),
    "gated": (SwiGLU, False),
    "gated with norm": (SwiGLU, True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_the_kinds_they_stand_for(family):
    for mlp in mlps(FAMILIES[family]()).values():
        assert (type(mlp.module), mlp.has_norm) == KIND.get(family, (Mlp, False))


@pytest.mark.parametrize("family", FAMILIES)
def test_order_is_that_of_the_network(family):
    model = FAMILIES[family]()
    called = []
    for name, mlp in mlps(model).items():
        mlp.module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(tiny.pixels())
    assert called == list(mlps(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_an_attention_pool_has_an_mlp_in_its_head(family):
    heads = [name for name, mlp in mlps(FAMILIES[family]()).items() if mlp.in_pool_head]
    assert heads == (["attn_pool.mlp"] if family == "attention pool" else [])


@pytest.mark.parametrize("family", FAMILIES)
def test_unit_parameters_tell_the_size_of_another_model(family):
    model = FAMILIES[family]()
    with torch.device("meta"):
        other = like(model, mlp_ratio=1.5)
    expected = sum(parameter.numel() for parameter in model.parameters())
    for name, mlp in mlps(model).items():
        expected -= mlp.unit_parameters * (mlp.hidden_features - widths(other)[name])
    assert sum(parameter.numel() for parameter in other.parameters()) == expected
    assert widths(other) != widths(model)


class OtherMlp(Mlp):
    """An Mlp by ``isinstance``, but who knows what it computes."""


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("vit_tiny_patch16_224", {"mlp_layer": OtherMlp}, r": blocks\.0\.mlp is a OtherMlp,"),
        ("vit_tiny_patch16_224", {"mlp_layer": GatedMlp}, r": blocks\.0\.mlp is a GatedMlp,"),
        ("vit_tiny_patch16_224", {"mlp_layer": ConvMlp}, r": blocks\.0\.mlp is a ConvMlp,"),
        ("vitamin_small_224", {}, r": blocks\.0\.mlp is a GeGluMlp,"),
        ("convnext_atto", {}, r": stages\.0\.blocks\.0\.mlp is a Mlp of convolutions,"),
        ("caformer_s18", {}, r": stages\.0\.blocks\.0\.mlp is a Mlp of convolutions,"),
        ("convnextv2_atto", {}, r": stages\.0\.blocks\.0\.mlp is a GlobalResponseNormMlp,"),
        ("inception_next_atto", {}, r": stages\.0\.blocks\.0\.mlp is a ConvMlp,"),
        ("levit_128s", {}, r": stages\.0\.blocks\.0\.mlp is a LevitMlp,"),
        ("resnet18", {}, r" has no timm Mlp, GluMlp or SwiGLU"),
        ("gmlp_ti16_224", {}, r" has no timm Mlp, GluMlp or SwiGLU"),
    ],
)
def test_other_mlps_are_refused_by_name(name, arguments, said):
    if name.startswith("vit_"):
        arguments = arguments | {"depth": 1}
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    with pytest.raises(DgmrError, match=f"^{name}{said}") as refusal:
        mlps(model)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", [Mlp, GluMlp])
def test_mlps_of_convolutions_are_refused_under_any_name(kind):
    model = nn.ModuleDict({"mlp": Mlp(4, 8), "ffn": kind(4, 8, use_conv=True)})
    with pytest.raises(DgmrError, match=f"ModuleDict: ffn is a {kind.__name__} of convolutions,"):
        mlps(model)


def test_a_single_other_mlp_among_many_is_refused():
    model = tiny.vit(depth=3)
    model.blocks[2].mlp = OtherMlp(32, 128)
    with pytest.raises(DgmrError, match=r"blocks\.2\.mlp is a OtherMlp,"):
        mlps(model)


def test_blocks_without_an_mlp_are_passed_over():
    model = tiny.vit()
    model.blocks[0].mlp = nn.Identity()
    assert list(mlps(model)) == ["blocks.1.mlp"]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_what_the_network_is_a_row_of(family):
    model = FAMILIES[family]()
    if hasattr(model, "blocks"):
        wanted = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    else:
        wanted = {
            f"layers.{i}.blocks.{j}": block
            for i, layer in enumerate(model.layers)
            for j, block in enumerate(layer.blocks)
        }
    found = blocks(model)
    assert list(found) == list(wanted)  # no pool head
    assert all(found[name] is block for name, block in wanted.items())


def test_blocks_of_more_than_nine_are_in_the_order_of_the_network():
    names = list(blocks(tiny.vit(depth=12)))
    assert names == [f"blocks.{index}" for index in range(12)]


def test_a_block_of_two_mlps_is_one_block():
    block = nn.ModuleDict({"mlp": Mlp(4, 8), "mlp2": Mlp(4, 8)})
    assert list(blocks(nn.ModuleDict({"first": block}))) == ["first"]


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_inputs_are_those_of_the_last_pass(family):
    model, seen = FAMILIES[family](), {}
    for name, mlp in mlps(model).items():
        first = getattr(mlp.module, "fc1", None) or mlp.module.fc1_g
        first.register_forward_pre_hook(partial(_keep, seen, name))
    with recorded_mlp_inputs(model) as inputs:
        model(tiny.pixels(seed=1))
        model(tiny.pixels(3))
        assert list(inputs) == list(mlps(model))
        for name, value in inputs.items():
            assert value.ndim == 3 and len(value) == 3
            assert torch.equal(value, seen[name].reshape(value.shape))
            assert not value.requires_grad


def _keep(seen, name, _module, arguments):
    seen[name] = arguments[0]


def test_recording_ends_with_its_block_even_by_an_error():
    model = tiny.vit()
    with pytest.raises(KeyError), recorded_mlp_inputs(model) as inputs:
        raise KeyError
    model(tiny.pixels())
    assert not inputs


def test_mlps_that_are_one_module_are_refused_by_name():
    model = tiny.vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(DgmrError, match="blocks.0.mlp and blocks.1.mlp are the same module"):
        mlps(model)
