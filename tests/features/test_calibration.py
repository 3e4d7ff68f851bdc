"""Calibration inputs are the MLPs' true inputs, of the images they should be of."""

from functools import partial

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.features.calibration import compute
from dgmr.models import widths
from dgmr.params import Calibration
from safetensors.torch import load_file

IMAGES = sum(tiny.COUNTS)
ALL = 1000  # more tokens or samples than there are


def run(folder, teacher, data, samples=ALL, tokens=ALL, seed=0, batch_size=4):
    compute(
        teacher, data, Calibration(samples=samples, tokens=tokens, seed=seed), batch_size, folder
    )
    return {path.stem: load_file(path)["inputs"] for path in sorted(folder.iterdir())}


@torch.inference_mode()
def true_inputs(teacher, names, batch_size=4):
    """``[images, tokens, N]`` that enter fc1, with timm's own loading and transform."""
    model = timm.create_model(f"local-dir:{teacher}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    images = torch.stack([transform(tiny.image(index)) for index in range(IMAGES)])
    seen = {name: [] for name in names}
    for name in names:
        hook = partial(_append, seen[name])
        model.get_submodule(name).fc1.register_forward_pre_hook(hook)
    for batch in images.split(batch_size):
        model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _append(parts, _module, arguments):
    (value,) = arguments
    parts.append(value.reshape(len(value), -1, value.shape[-1]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_tokens_are_the_true_inputs_image_by_image(tmp_path, data, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.FAMILIES[family]())
    found = run(tmp_path / "calibration", teacher, data)
    expected = true_inputs(teacher, found)
    for name, inputs in found.items():
        assert inputs.dtype == torch.float32
        assert torch.equal(inputs, expected[name].flatten(0, 1))
    assert found.keys() == widths(artefact.load(teacher)).keys()


def test_few_tokens_are_real_ones_of_their_own_image(tmp_path, teacher, data):
    found = run(tmp_path / "calibration", teacher, data, tokens=5)
    expected = true_inputs(teacher, found)
    for name, inputs in found.items():
        assert inputs.shape == (IMAGES * 5, 32)
        choices = set()
        for image, kept in enumerate(inputs.split(5)):
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
    assert len(some) == 7 * 17
    torch.testing.assert_close(some, whole[: 7 * 17], rtol=1e-5, atol=1e-5)


def test_batch_size_changes_rounding_at_most(tmp_path, teacher, data):
    one = run(tmp_path / "one", teacher, data, batch_size=1)
    many = run(tmp_path / "many", teacher, data, batch_size=64)
    for name, inputs in one.items():
        torch.testing.assert_close(inputs, many[name], rtol=1e-5, atol=1e-5)
