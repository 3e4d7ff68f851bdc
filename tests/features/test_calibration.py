"""Calibration inputs are the MLPs' true inputs, of the images they should be of."""

import json
from functools import partial

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.features.calibration import compute
from dgmr.mlps import widths
from safetensors import safe_open
from safetensors.torch import load_file

FAMILIES = tiny.FAMILIES | {"swin v2": tiny.swin_v2}
IMAGES = sum(tiny.COUNTS)
ALL = 1000  # more tokens or samples than there are


def run(folder, teacher, data, samples=ALL, tokens=ALL, seed=0, batch_size=4):
    calibrated = {"samples": samples, "tokens": tokens, "seed": seed}
    config = tiny.features_config(calibration=calibrated, batch_size=batch_size)
    compute(teacher, data, config, folder)
    return {path.stem: load_file(path)["inputs"] for path in sorted(folder.iterdir())}


@torch.inference_mode()
def true_inputs(teacher, names, batch_size=4):
    """``[images, tokens, N]`` that enter the MLPs, with timm's own loading and transform."""
    model = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    images = torch.stack([transform(tiny.image(index)) for index in range(IMAGES)])
    seen = {name: [] for name in names}
    for name in names:
        hook = partial(_append, seen[name])
        model.get_submodule(name).register_forward_pre_hook(hook)
    for batch in images.split(batch_size):
        model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _append(parts, _module, arguments):
    (value,) = arguments
    parts.append(value.reshape(len(value), -1, value.shape[-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_are_the_true_inputs_image_by_image(tmp_path, data, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", FAMILIES[family]())
    found = run(tmp_path / "calibration", teacher, data)
    expected = true_inputs(teacher, found)
    for name, inputs in found.items():
        assert inputs.dtype == torch.float32 and inputs.ndim == 3
        assert torch.equal(inputs, expected[name])
    assert found.keys() == widths(artefact.load(teacher)).keys()


def test_few_tokens_are_real_ones_of_their_own_image(tmp_path, teacher, data):
    found = run(tmp_path / "calibration", teacher, data, tokens=5)
    expected = true_inputs(teacher, found)
    for name, inputs in found.items():
        assert inputs.shape == (IMAGES, 5, 32)
        choices = set()
        for image, kept in enumerate(inputs):
            equal = (kept[:, None] == expected[name][image][None]).all(2)  # [5, tokens]
            assert (equal.sum(1) == 1).all()
            chosen = equal.int().argmax(1).tolist()
            assert len(set(chosen)) == 5
            choices.add(tuple(chosen))
        assert len(choices) > IMAGES // 2  # drawn anew for each


def test_draws_follow_the_seed_alone(tmp_path, teacher, data):
    first = run(tmp_path / "first", teacher, data, tokens=5)["blocks.0.mlp"]
    torch.manual_seed(99)
    again = run(tmp_path / "again", teacher, data, tokens=5)["blocks.0.mlp"]
    other = run(tmp_path / "other", teacher, data, tokens=5, seed=1)["blocks.0.mlp"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_first_samples_are_taken_across_shards(tmp_path, teacher, data):
    whole = run(tmp_path / "whole", teacher, data)["blocks.1.mlp"]
    some = run(tmp_path / "some", teacher, data, samples=7)["blocks.1.mlp"]
    assert some.shape == (7, 17, 32)
    torch.testing.assert_close(some, whole[:7], rtol=1e-5, atol=1e-5)


def test_batch_size_changes_rounding_at_most(tmp_path, teacher, data):
    one = run(tmp_path / "one", teacher, data, batch_size=1)
    many = run(tmp_path / "many", teacher, data, batch_size=64)
    for name, inputs in one.items():
        torch.testing.assert_close(inputs, many[name], rtol=1e-5, atol=1e-5)


def test_files_name_the_teacher_and_hold_nothing_else(tmp_path, teacher, data):
    run(tmp_path / "calibration", teacher, data)
    for path in (tmp_path / "calibration").iterdir():
        with safe_open(path, framework="pt") as file:
            assert list(file.keys()) == ["inputs"]
            origin = json.loads(file.metadata()["origin"])
        assert origin == {"teacher_sha256": artefact.provenance(teacher)["sha256"]}


def test_a_teacher_in_bfloat16_has_float32_inputs(tmp_path, data):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.vit().to(torch.bfloat16))
    found = run(tmp_path / "calibration", teacher, data)
    for name, expected in true_inputs(teacher, found).items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected)


def test_nothing_is_left_of_a_damaged_teacher_or_a_pass_that_fails(tmp_path, data, monkeypatch):
    teacher = tiny.write_teacher(tmp_path / "teacher")

    def fails(*_):
        raise KeyError("amid the images")

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr("dgmr.features.calibration.some_tokens", fails)
        run(tmp_path / "calibration", teacher, data)
    tiny.damage(teacher / "model.safetensors")
    with pytest.raises(DgmrError, match="model.safetensors is not the file"):
        run(tmp_path / "calibration", teacher, data)
    assert not (tmp_path / "calibration").exists()
