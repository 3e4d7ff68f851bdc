"""Teacher and student are asked the same, and answer what they would without being asked."""

import pytest
import tiny
import torch
from dgmr import answers
from dgmr.answers import Answers
from dgmr.errors import DgmrError
from dgmr.features.targets import compute
from dgmr.mlps import mlps
from dgmr.models import outputs

FAMILIES = tiny.FAMILIES | {"swin v2": tiny.swin_v2}
data = tiny.data  # a fixture


def config(**changes):
    return tiny.features_config(**changes)


def block_modules(model):
    """All blocks, by timm's own attributes."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    return [block for layer in model.layers for block in layer.blocks]


@torch.inference_mode()
def said(model, images, **changes):
    return Answers(model, config(**changes))(images)


@torch.inference_mode()
def hooked(model, images):
    """What every block gives, by hooks of the test's own."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        for block in block_modules(model)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_models_own(family):
    model, images = FAMILIES[family](), tiny.pixels(3)
    wanted = hooked(model, images)
    asked = tuple(range(len(wanted)))
    found = said(model, images, blocks=asked)
    assert list(found) == ["pooled", "patch_tokens", *(f"blocks.{index}" for index in asked)]
    with torch.inference_mode():
        pooled, patch_tokens = outputs(model, images)
    assert torch.equal(found["pooled"], pooled)
    assert torch.equal(found["patch_tokens"], patch_tokens)
    for index, tokens in enumerate(wanted):
        in_a_row = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        assert torch.equal(found[f"blocks.{index}"], in_a_row)


@torch.inference_mode()
def test_a_blocks_answer_is_what_a_loop_over_the_blocks_gives():
    model, images = tiny.registers_vit(), tiny.pixels(2)
    found = said(model, images, blocks=(1, 0))
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    assert tokens.shape[1] == 16 + 4  # with class token and registers
    for index, block in enumerate(model.blocks):
        tokens = block(tokens)
        assert torch.equal(found[f"blocks.{index}"], tokens)
    assert torch.equal(found["patch_tokens"], model.norm(tokens)[:, 4:])


def test_tokens_of_swin_are_in_rows_first():
    model, images = tiny.swin(), tiny.pixels(2)
    output, _ = hooked(model, images)
    assert output.shape == (2, 8, 8, 16)
    found = said(model, images, blocks=(0,))["blocks.0"]
    assert found.shape == (2, 64, 16)
    for row, column in ((0, 0), (2, 5), (7, 1)):
        assert torch.equal(found[:, 8 * row + column], output[:, row, column])


@pytest.mark.parametrize("family", ["class token", "registers", "swin", "attention pool"])
@pytest.mark.parametrize("every", [1, 2, 3, 16, 17, 100])
def test_every_kth_patch_token(family, every):
    model, images = FAMILIES[family](), tiny.pixels(2)
    with torch.inference_mode():
        _, patch_tokens = outputs(model, images)
    wanted = torch.stack(
        [patch_tokens[:, i] for i in range(patch_tokens.shape[1]) if i % every == 0], 1
    )
    assert torch.equal(said(model, images, patch_tokens=every)["patch_tokens"], wanted)


def test_what_is_not_asked_for_is_not_said():
    model, images = tiny.vit(), tiny.pixels(2)
    assert set(said(model, images, patch_tokens=None)) == {"pooled"}
    assert set(said(model, images, patch_tokens=None, blocks=(1,))) == {"pooled", "blocks.1"}


def test_each_pass_gives_its_own_and_leaves_no_hook():
    model = tiny.vit()
    asked = Answers(model, config(blocks=(0, 1)))
    first, second = (asked(tiny.pixels(count, seed=count)) for count in (2, 3))
    assert {len(tensor) for tensor in first.values()} == {2}
    assert {len(tensor) for tensor in second.values()} == {3}
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_of_every_answer_reach_the_blocks():
    model = tiny.vit()
    for name, tensor in Answers(model, config(blocks=(0,)))(tiny.pixels(2)).items():
        model.zero_grad()
        tensor.square().mean().backward(retain_graph=True)
        assert bool(model.blocks[0].mlp.fc1.weight.grad.any()), name
        assert (model.blocks[1].mlp.fc1.weight.grad is None) == (name == "blocks.0")


def test_the_models_own_tensors_keep_their_names_below_model():
    model = tiny.vit()
    wanted = {f"model.{name}" for name in model.state_dict()}
    assert set(Answers(model, config(blocks=(1,))).state_dict()) == wanted


@pytest.mark.parametrize("family", ["class token", "swin", "attention pool"])
def test_a_block_that_is_not_there_is_told_in_one_sentence(family):
    model = FAMILIES[family]()
    count = len(block_modules(model))
    with pytest.raises(DgmrError) as error:
        Answers(model, config(blocks=(0, count)))
    assert str(error.value) == (
        f"features.blocks: there is no block {count}; the model's are 0 to {count - 1}."
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_has_the_names_and_shapes_of_the_real_answers(family):
    last = len([mlp for mlp in mlps(FAMILIES[family]()).values() if not mlp.in_pool_head]) - 1
    asked = config(blocks=(last,), patch_tokens=3)
    found = answers.layout(FAMILIES[family]().to("meta"), asked)
    assert all(tensor.is_meta for tensor in found.values())
    with torch.inference_mode():
        real = Answers(FAMILIES[family](), asked)(tiny.pixels(1))
    assert {n: tuple(t.shape) for n, t in found.items()} == {
        n: tuple(t.shape) for n, t in real.items()
    }
    assert list(found) == list(real)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"dtype": "bfloat16"},
        {"pixels": False},
        {"patch_tokens": None},
        {"patch_tokens": 3, "blocks": (0, 1), "dtype": "bfloat16"},
        {"patch_tokens": None, "pixels": False, "blocks": (1,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["class token", "swin"])
def test_bytes_per_view_are_those_on_disk(tmp_path, data, family, asked):
    model = FAMILIES[family]()
    teacher = tiny.write_teacher(tmp_path / "teacher", model)
    compute(teacher, data, ["00000"], config(**asked), tmp_path / "targets")
    found = answers.bytes_per_view(model.to("meta"), config(**asked))
    for view in (0, 1):
        content = (tmp_path / "targets" / f"00000.view{view}.safetensors").read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        assert found * tiny.COUNTS[0] == len(content) - header
