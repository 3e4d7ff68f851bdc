"""The recipe of the demo teacher, on far fewer images."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from dgmr import artefact, fashion_mnist
from dgmr.models import widths
from dgmr.teacher import demo

RECIPE = demo.Recipe(epochs=1, warmup_epochs=0.5, batch_size=64)


def pictures(count, seed):
    """Noise with a bright band whose place is the label."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, count, dtype=np.uint8)
    images = draw.integers(0, 60, (count, 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 6 + 2 * label] = 255
    return images, labels


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    sets = {"train": pictures(520, 0), "test": pictures(130, 1)}
    monkeypatch.setattr(fashion_mnist, "load", lambda split, _folder: sets[split])
    return sets


def test_teacher_is_a_plain_timm_model_of_its_recipe(tmp_path, few_images):
    top1 = demo.train(tmp_path / "demo", tmp_path, RECIPE)
    model = timm.create_model(f"local-dir:{tmp_path / 'demo'}", pretrained=True).eval()
    assert set(widths(model).values()) == {768} and len(widths(model)) == 6
    found = artefact.provenance(tmp_path / "demo")
    assert found["recipe"] == dataclasses.asdict(RECIPE) and found["recipe"]["epochs"] == 1
    assert found["test_top1"] == top1
    # What training saw of an image is what timm's transform makes of it later.
    images, labels = few_images["test"]
    normalised = (images / 255 - model.pretrained_cfg["mean"][0]) / model.pretrained_cfg["std"][0]
    pixels = torch.tensor(normalised, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    with torch.inference_mode():
        hits = (model(pixels).argmax(1).numpy() == labels).mean()
    assert 100 * hits == pytest.approx(top1)


def test_same_recipe_twice_gives_the_same_bits_and_another_seed_others(tmp_path):
    for name, seed in {"first": 0, "again": 0, "other": 1}.items():
        demo.train(tmp_path / name, tmp_path, dataclasses.replace(RECIPE, seed=seed))
    first, again, other = (
        artefact.provenance(tmp_path / name)["sha256"] for name in ("first", "again", "other")
    )
    assert first == again != other


def test_more_training_learns(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=6, batch_size=40)
    assert demo.train(tmp_path / "demo", tmp_path, recipe) > 30


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
