"""Models read block by block say the same as whole ones, and passes can be kept in step."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.mlps import mlps
from dgmr.prune import prune_model
from dgmr.streaming import in_step, streamed

FAMILIES = tiny.FAMILIES | {"swin v2": tiny.swin_v2}
CPU = torch.device("cpu")
IMAGES = [tiny.pixels(2, seed=1), tiny.pixels(3, seed=2), tiny.pixels(2, seed=3)]


def deep(family):
    """Of four blocks; Swin's windows are shifted in every other one, for which it has a mask."""
    depth = {"depths": (2, 2)} if family.startswith("swin") else {"depth": 4}
    return FAMILIES[family](**depth)


def write(folder, model):
    artefact.save(folder, model, {})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", tiny.vit(depth=4))


def loaded_blocks(model):
    names = dict.fromkeys(name.rpartition(".")[0] for name in mlps(model))
    return [
        name
        for name in names
        if not all(parameter.is_meta for parameter in model.get_submodule(name).parameters())
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_streamed_is_the_artefact_s_model_bit_by_bit(tmp_path, family):
    folder = write(tmp_path / "model", deep(family))
    whole, model = artefact.load(folder), streamed(folder, CPU)
    assert not model.training
    for images in IMAGES:
        assert torch.equal(model(images), whole(images))
        assert torch.equal(model.forward_features(images), whole.forward_features(images))


@pytest.mark.parametrize("family", ["class token", "swin v2", "attention pool", "gated"])
@torch.inference_mode()
def test_two_blocks_at_most_are_in_memory(tmp_path, family):
    model = streamed(write(tmp_path / "model", deep(family)), CPU)
    assert loaded_blocks(model) == []
    counts = []
    for name, mlp in mlps(model).items():
        mlp.module.register_forward_hook(
            lambda *_, name=name: counts.append((name, loaded_blocks(model)))
        )
    model(IMAGES[0])
    model(IMAGES[1])
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in mlps(model)))
    assert len(counts) == 2 * len(blocks) and len(blocks) >= 4
    for name, found in counts:
        assert name.rpartition(".")[0] in found
        assert len(found) <= 2
    assert loaded_blocks(model) == blocks[-2:]
    outside = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_meta and not name.startswith(tuple(f"{block}." for block in blocks))
    ]
    assert outside == []


@pytest.mark.parametrize("family", ["class token", "swin", "swin v2", "gated with norm"])
@torch.inference_mode()
def test_an_artefact_in_bfloat16_is_computed_in_float32(tmp_path, family):
    folder = write(tmp_path / "model", deep(family).to(torch.bfloat16))
    whole, model = artefact.load(folder), streamed(folder, CPU)
    found = model(IMAGES[0])
    assert found.dtype == torch.float32
    assert torch.equal(found, whole(IMAGES[0]))
    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.is_floating_point() or tensor.dtype == torch.float32


@pytest.mark.parametrize(
    "family", ["swin", "swin v2", "beit", "gated", "gated with norm", "packed, rotary"]
)
@torch.inference_mode()
def test_buffers_in_no_file_are_made(tmp_path, family):
    folder = write(tmp_path / "model", deep(family))
    model, whole = streamed(folder, CPU), dict(artefact.load(folder).named_buffers())
    model(IMAGES[0])
    found = dict(model.named_buffers())
    assert found.keys() == whole.keys()
    assert all(torch.equal(buffer, whole[name]) for name, buffer in found.items())
    assert found.keys() - model.state_dict().keys()


@torch.inference_mode()
def test_models_of_uneven_widths_are_streamed_too(tmp_path):
    dense = tiny.vit(depth=4)
    wanted = {name: 9 + 4 * index for index, name in enumerate(mlps(dense))}
    folder = write(tmp_path / "model", prune_model(dense, hidden_features=wanted))
    assert torch.equal(streamed(folder, CPU)(IMAGES[0]), artefact.load(folder)(IMAGES[0]))


# In step


def in_step_outputs(model, batches, answer):
    """``in_step`` gives none itself: what the model puts out, in the order in which passes end."""
    found = []
    hook = model.register_forward_hook(lambda _model, _images, output: found.append(output))
    in_step(model, batches, answer)
    hook.remove()
    return found


def by_itself(folder):
    """An answer that is what the MLPs would say themselves, and a list of what it was asked."""
    dense, asked = mlps(artefact.load(folder)), []

    def answer(name, inputs):
        asked.append((name, inputs))
        return [dense[name].module(value) for value in inputs]

    return answer, asked


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_passes_in_step_say_what_plain_passes_say(tmp_path, family):
    folder = write(tmp_path / "model", deep(family))
    model = streamed(folder, CPU)
    plain = [artefact.load(folder)(images) for images in IMAGES]
    answer, asked = by_itself(folder)
    found = in_step_outputs(model, IMAGES, answer)
    assert len(found) == len(IMAGES) and all(map(torch.equal, found, plain))
    assert [name for name, _ in asked] == list(mlps(model))
    assert len(loaded_blocks(model)) <= 2


@torch.inference_mode()
def test_the_answer_sees_the_inputs_of_all_passes_at_once(folder):
    whole, seen = artefact.load(folder), {}
    for name, mlp in mlps(whole).items():
        mlp.module.register_forward_pre_hook(
            lambda _m, arguments, name=name: seen.setdefault(name, []).append(arguments[0])
        )
    for images in IMAGES:
        whole(images)
    answer, asked = by_itself(folder)
    in_step(artefact.load(folder), IMAGES, answer)
    assert [name for name, _ in asked] == list(seen)
    for name, inputs in asked:
        assert [len(value) for value in inputs] == [2, 3, 2]
        assert all(map(torch.equal, inputs, seen[name]))


@torch.inference_mode()
def test_what_is_answered_is_what_goes_on(folder):
    """The first pass with the MLPs' outputs doubled, the second without any."""
    model, doubled, silent = (artefact.load(folder) for _ in range(3))
    for mlp in mlps(doubled).values():
        mlp.module.register_forward_hook(lambda _m, _i, output: 2 * output)
    for mlp in mlps(silent).values():
        mlp.module.register_forward_hook(lambda _m, _i, output: 0 * output)
    dense = mlps(artefact.load(folder))

    def answer(name, inputs):
        first, second = (dense[name].module(value) for value in inputs)
        return [2 * first, 0 * second]

    found = in_step_outputs(model, IMAGES[:2], answer)
    assert torch.equal(found[0], doubled(IMAGES[0]))
    assert torch.equal(found[1], silent(IMAGES[1]))
    assert not torch.equal(found[0], model(IMAGES[0]))


@torch.inference_mode()
def test_mlps_work_by_themselves_again_afterwards(folder):
    model = artefact.load(folder)
    before = model(IMAGES[0])
    in_step(model, IMAGES, lambda _name, inputs: inputs)
    assert torch.equal(model(IMAGES[0]), before)
    assert not [name for name, mlp in mlps(model).items() if "forward" in vars(mlp.module)]


@torch.inference_mode()
def test_no_batches_at_all_are_no_harm(folder):
    model = artefact.load(folder)
    asked = []
    in_step(model, [], lambda name, _inputs: asked.append(name))
    assert asked == []
    assert torch.equal(model(IMAGES[0]), artefact.load(folder)(IMAGES[0]))


def test_too_few_answers_are_an_error(folder):
    with pytest.raises(ValueError, match="shorter"):
        in_step(artefact.load(folder), IMAGES, lambda _name, inputs: inputs[:2])


def test_an_error_of_the_answer_comes_through(folder):
    def answer(_name, _inputs):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        in_step(artefact.load(folder), IMAGES, answer)


def test_passes_in_step_keep_no_gradients(folder):
    model, answered = artefact.load(folder), []

    def answer(_name, inputs):
        answered.extend(inputs)
        return inputs

    found = in_step_outputs(model, IMAGES[:1], answer)
    assert answered and not any(value.requires_grad for value in [*answered, *found])
