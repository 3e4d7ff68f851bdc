"""The recipe of the demo teacher, on far fewer images."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from dgmr import artefact, fashion_mnist
from dgmr.mlps import widths
from dgmr.teacher import demo

RECIPE = demo.Recipe(epochs=1, warmup_epochs=0.5, batch_size=64)


def pictures(count, seed):
    """Noise as bright as its label says."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, count, dtype=np.uint8)
    noise = draw.integers(0, 20, (count, 28, 28), dtype=np.uint8)
    return noise + 24 * labels[:, None, None], labels


SETS = {"train": pictures(520, 0), "test": pictures(130, 1)}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(fashion_mnist, "load", lambda split, _folder: SETS[split])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The artefact of RECIPE, and the accuracy that training told."""
    folder = tmp_path_factory.mktemp("demo") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "load", lambda split, _folder: SETS[split])
        return folder, demo.train(folder, folder, RECIPE)


def test_teacher_is_a_plain_timm_model_of_its_recipe(first):
    folder, _ = first
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert set(widths(model).values()) == {768} and len(widths(model)) == 6
    found = artefact.provenance(folder)
    assert found["recipe"] == dataclasses.asdict(RECIPE)
    assert found["recipe"]["epochs"] == 1
    assert found["torch_threads"] == torch.get_num_threads()


def test_told_accuracy_is_the_loaded_model_s(first):
    folder, top1 = first
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    about, (images, labels) = model.pretrained_cfg, SETS["test"]
    normalised = (images / 255 - about["mean"][0]) / about["std"][0]
    pixels = torch.tensor(normalised, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        hits = (model(pixels).argmax(1).numpy() == labels).mean()
    assert 100 * hits == pytest.approx(top1)
    assert artefact.provenance(folder)["test_top1"] == top1
    assert top1 > 25  # 8 steps learn something; chance is 10


def test_same_recipe_gives_the_same_bits_and_another_seed_others(first, tmp_path):
    folder, _ = first
    demo.train(tmp_path / "again", tmp_path, RECIPE)
    demo.train(tmp_path / "other", tmp_path, dataclasses.replace(RECIPE, seed=1))
    hashes = [artefact.provenance(f)["sha256"] for f in (folder, *sorted(tmp_path.iterdir()))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_augmentation_shifts_and_mirrors_and_fills_with_black():
    torch.manual_seed(0)
    black = -fashion_mnist.MEAN / fashion_mnist.STD
    image = torch.full((28, 28), black)
    image[10, 5] = 1.0
    found = demo._augment(image.expand(400, 1, 28, 28), max_shift=2)
    assert found.shape == (400, 3, 28, 28)
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    assert set(found.unique().tolist()) == {image.min().item(), 1.0}
    places = {tuple(place) for place in (found[:, 0] == 1).nonzero()[:, 1:].tolist()}
    columns = [*range(3, 8), *range(20, 25)]
    assert places == {(row, column) for row in range(8, 13) for column in columns}
