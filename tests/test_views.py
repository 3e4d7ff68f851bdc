"""A view is a pure function of (seed, key, view): the student sees the pixels the teacher saw."""

import colorsys
import dataclasses
import hashlib
import importlib.metadata
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from dgmr.params import Views
from dgmr.shards import decode
from dgmr.views import ViewTransform
from pictures import picture
from PIL import Image
from torchvision import transforms

REPOSITORY = Path(__file__).parents[1]
HALF = (0.5, 0.5, 0.5)
DINOV2 = {"color_jitter": {}, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2}


def transform(size=(24, 16), **views):
    return ViewTransform(Views(**views), size, "bicubic", HALF, HALF)


def digest(pixels):
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def pixels_of_some(paths=()):
    """Digests of views of a picture and of photos; run here and in another process."""
    images = [picture(4, (90, 70)), *(decode(Path(path).read_bytes()) for path in paths)]
    found = []
    for colours in ({}, DINOV2):
        view = transform(size=(64, 64), seed=5, **colours)
        found += [
            digest(view(image, f"key-{i}", v)) for i, image in enumerate(images) for v in (0, 1)
        ]
    return found


@pytest.fixture(scope="module")
def elsewhere(some_photos):
    """What another process, with other global seeds, finds of a picture and of photos if any."""
    script = (
        "import sys, json, random, numpy, torch;"
        "random.seed(9); numpy.random.seed(9); torch.manual_seed(9); torch.rand(5);"
        "import test_views; print(json.dumps(test_views.pixels_of_some(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, some_photos)],
        env={"PYTHONPATH": f"{REPOSITORY / 'workflow'}:{REPOSITORY / 'tests'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_same_pixels_in_another_process(elsewhere, some_photos):
    assert elsewhere == pixels_of_some(some_photos)
    assert len(set(elsewhere)) == len(elsewhere) == 4 * (len(some_photos) + 1)


@pytest.mark.parametrize("colours", [{}, DINOV2], ids=["crops", "colours"])
def test_pixels_do_not_depend_on_the_global_state_nor_change_it(colours):
    view, image = transform(**colours), picture()
    first = view(image, "k", 0)
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(view(image, "k", 0), first)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_accelerators_are_not_seeded(monkeypatch):
    """torch.manual_seed would: the student's dropout would then repeat itself at each image."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(0)
    assert seeded == [0]  # this is how it would be seen
    transform()(picture(), "k", 0)
    assert seeded == [0]


def test_pixels_differ_by_seed_key_and_view():
    image = picture(size=(120, 90))
    found = {
        (seed, key, view): digest(transform(seed=seed, count=3)(image, key, view))
        for seed in (0, 1, 2)
        for key in ("a", "b", "1", "11")
        for view in (0, 1, 11)
    }
    assert len(set(found.values())) == len(found)


def test_order_of_calls_does_not_matter():
    view, image = transform(**DINOV2), picture()
    forth = [view(image, "k", i) for i in range(4)]
    back = [view(image, "k", i) for i in reversed(range(4))]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))


def half_and_half():
    """Left half black, right half white: a flip shows."""
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (20, 0, 40, 40))
    return image


def flipped(pixels):
    return bool(pixels[..., 0].sum() > pixels[..., -1].sum())


def test_flips_never_always_and_half_the_time():
    def share(flip):
        view = transform(size=(16, 16), flip=flip, crop_scale=(1.0, 1.0))
        return np.mean([flipped(view(half_and_half(), f"{i}", 0)) for i in range(200)])

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert 0.35 < share(0.5) < 0.65


def test_a_flip_mirrors_the_same_crop():
    image = picture(2, (120, 90))
    for key in "abcd":
        straight = transform(flip=0.0)(image, key, 0)
        mirrored = transform(flip=1.0)(image, key, 0)
        assert torch.equal(straight.flip(-1), mirrored) and not torch.equal(straight, mirrored)


def bytes_of(image):
    """``[C, H, W]`` uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_whole_image_where_nothing_is_cropped():
    image = picture(3, (32, 32))
    view = transform(size=(32, 32), flip=0.0, crop_scale=(1.0, 1.0))
    assert all(torch.equal(view(image, f"{i}", 0), bytes_of(image)) for i in range(30))


@pytest.mark.parametrize("scale", [(0.2, 0.3), (0.8, 1.0)])
def test_crops_have_the_area_that_was_asked_for(scale):
    """Each crop of a ramp shows, by its range of values, which part of the width it covers."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=-1))
    view = transform(size=(32, 32), flip=0.0, crop_scale=scale)
    areas = []
    for i in range(100):
        red, green, _ = view(image, f"{i}", 0) / 255
        width, height = (float(channel.max() - channel.min()) * 32 / 31 for channel in (red, green))
        areas.append(width * height)
        assert 0.7 < width / height < 1.4
    assert scale[0] - 0.03 < min(areas) and max(areas) < scale[1] + 0.03
    assert max(areas) - min(areas) > (scale[1] - scale[0]) / 2


def test_sizes_interpolation_mean_and_std_are_the_models():
    model = tiny.vit()
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    model.pretrained_cfg = model.pretrained_cfg | own | {"input_size": (3, 24, 48)}
    view = ViewTransform.for_model(model, Views(seed=3))
    assert view == ViewTransform(Views(seed=3), (24, 48), **own)
    assert view(picture(), "k", 0).shape == (3, 24, 48)


def test_height_comes_before_width_and_pixels_are_bytes():
    pixels = transform(size=(24, 16))(Image.new("RGB", (50, 50), (255, 128, 0)), "k", 0)
    assert pixels.shape == (3, 24, 16) and pixels.dtype == torch.uint8
    assert pixels.amin((1, 2)).tolist() == pixels.amax((1, 2)).tolist() == [255, 128, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_images_of_any_shape_have_views(size):
    pixels = transform(**DINOV2)(picture(size=size), "k", 0)
    assert pixels.shape == (3, 24, 16) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("mean", [HALF, (0.485, 0.456, 0.406)])
def test_normalised_pixels_are_torchvisions_bit_for_bit(mean):
    std = (0.229, 0.224, 0.225)
    view = ViewTransform(Views(), (40, 30), "bicubic", mean, std)
    images = [picture(i, (30, 40)) for i in range(3)]
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    pixels = torch.stack([bytes_of(image) for image in images])
    before = pixels.clone()
    found = view.normalised(pixels)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.stack([theirs(image) for image in images]))
    assert torch.equal(pixels, before)


# Colours: pixels of a view with one change of colours, and of the same crop without any.


def both(key, **colours):
    image = picture(7, (60, 50))
    plain, changed = (transform((32, 32), **each)(image, key, 0) for each in ({}, colours))
    return plain.double(), changed.double()


def only(kind, most, probability=1.0):
    kinds = ("brightness", "contrast", "saturation", "hue")
    strength = dict.fromkeys(kinds, 0.0) | {kind: most}
    return {"color_jitter": strength | {"probability": probability}}


def gray_of(pixels):
    red, green, blue = pixels
    return (0.299 * red + 0.587 * green + 0.114 * blue).round()


CHANGES = {"grayscale": {"grayscale": 1.0}, "blur": {"blur": 1.0}, "solarize": {"solarize": 1.0}}
CHANGES |= {"brightness": only("brightness", 0.4), "contrast": only("contrast", 0.4)}
CHANGES |= {"saturation": only("saturation", 0.4), "hue": only("hue", 0.1)}


def test_grayscale_is_the_luminance_in_all_channels():
    for key in "abcd":
        plain, changed = both(key, grayscale=1.0)
        assert (changed - gray_of(plain)).abs().max() <= 1


def test_solarize_inverts_the_upper_half_of_values():
    for key in "abcd":
        plain, changed = both(key, solarize=1.0)
        assert torch.equal(changed, torch.where(plain < 128, plain, 255 - plain))


def blurred(pixels, sigma):
    """A Gaussian of 9 pixels along each axis, borders mirrored."""
    weights = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma) ** 2).double()
    weights = weights / weights.sum()
    for axis in (1, 2):
        length = pixels.shape[axis]
        at = torch.arange(length)
        neighbours = (at + step for step in range(-4, 5))
        mirrored = [length - 1 - (length - 1 - n.abs()).abs() for n in neighbours]
        parts = [w * pixels.index_select(axis, m) for w, m in zip(weights, mirrored, strict=True)]
        pixels = torch.stack(parts).sum(0)
    return pixels


def test_blur_is_a_gaussian_of_01_to_2_pixels():
    sigmas = torch.linspace(0.1, 2, 191).tolist()
    fitting = []
    for key in "abcdef":
        plain, changed = both(key, blur=1.0)
        errors = [float((blurred(plain, sigma) - changed).abs().max()) for sigma in sigmas]
        assert min(errors) <= 1.5  # of 255
        fitting.append(sigmas[errors.index(min(errors))])
    assert max(fitting) - min(fitting) > 0.5


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_jitter_is_a_factor_on_the_distance_from(kind):
    """Black, the picture's mean gray, or each pixel's own gray."""
    factors = []
    for index in range(40):
        plain, changed = both(f"{index}", **only(kind, 0.4))
        gray = gray_of(plain)
        base = {
            "brightness": torch.zeros_like(gray),
            "contrast": gray.mean().round().expand_as(gray),
            "saturation": gray,
        }[kind]
        way = plain - base
        inside = (changed > 0) & (changed < 255)
        factors.append(float(((changed - base) * way)[inside].sum() / way[inside].square().sum()))
        assert ((base + factors[-1] * way).clamp(0, 255) - changed).abs().max() <= 2
    assert 0.59 < min(factors) < 0.75 and 1.25 < max(factors) < 1.41


def test_jitter_of_the_hue_turns_it_by_up_to_its_value():
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    turned = []
    for index in range(40):
        view = transform((8, 8), **only("hue", 0.1))
        hue, saturation, value = colorsys.rgb_to_hsv(*(view(red, f"{index}", 0)[:, 0, 0] / 255))
        assert float(saturation) == float(value) == 1
        turned.append((float(hue) + 0.5) % 1 - 0.5)
    assert -0.11 < min(turned) < -0.06 and 0.06 < max(turned) < 0.11


@pytest.mark.parametrize("name", CHANGES)
def test_changes_happen_as_often_as_they_should(name):
    def share(probability):
        if name in ("grayscale", "blur", "solarize"):
            colours = {name: probability}
        else:
            strength = CHANGES[name]["color_jitter"][name]
            colours = only(name, strength, probability)
        pairs = (both(f"{i}", **colours) for i in range(150))
        return np.mean([not torch.equal(*pair) for pair in pairs])

    assert share(0.0) == 0
    assert 0.18 < share(0.3) < 0.42  # three standard deviations
    assert share(1.0) > 0.85  # a blur of a quarter of a pixel changes none


def test_all_changes_together_are_as_many_pictures_as_views():
    image = picture(7, (60, 50))
    view = transform((32, 32), **DINOV2)
    assert len({digest(view(image, f"{i}", v)) for i in range(20) for v in (0, 1)}) == 40


# What is written down of a view


def test_about_is_json_and_says_what_shapes_the_pixels():
    about = transform(**DINOV2).about()
    assert json.loads(json.dumps(about)) == about
    assert about["views"]["grayscale"] == 0.2 and about["views"]["color_jitter"]["hue"] == 0.1
    assert about["size"] == [24, 16] and about["interpolation"] == "bicubic"
    assert about["pillow"] == importlib.metadata.version("pillow")


@pytest.mark.parametrize(
    "change",
    [
        {"views": Views(seed=1)},
        {"views": Views(count=2)},
        {"views": Views(crop_scale=(0.3, 1.0))},
        {"views": Views(flip=0.4)},
        {"views": Views(grayscale=0.1)},
        {"views": Views(blur=0.1)},
        {"views": Views(solarize=0.1)},
        {"views": Views.model_validate({"color_jitter": {}})},
        {"size": (16, 24)},
        {"interpolation": "bilinear"},
        {"mean": (0.5, 0.5, 0.4)},
        {"std": (0.4, 0.5, 0.5)},
    ],
    ids=str,
)
def test_about_changes_with(change):
    before = transform()
    assert dataclasses.replace(before, **change).about() != before.about()
    assert transform().about() == before.about()


@pytest.mark.parametrize("library", ["pillow", "torchvision"])
def test_about_changes_with_the_version_of(library, monkeypatch):
    before, true = transform().about(), importlib.metadata.version
    other = lambda name: "0.0" if name == library else true(name)  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "version", other)
    assert transform().about() == before | {library: "0.0"} != before
