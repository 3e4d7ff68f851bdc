"""A view is a pure function of (seed, key, view): the student sees the pixels the teacher saw."""

import hashlib
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

REPOSITORY = Path(__file__).parents[1]
HALF = (0.5, 0.5, 0.5)


def transform(size=(24, 16), **views):
    return ViewTransform(Views(**views), size, "bicubic", HALF, HALF)


def digest(pixels):
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def pixels_of_some(paths=()):
    """Digests of views of a picture and of photos; run here and in another process."""
    images = [picture(4, (90, 70)), *(decode(Path(path).read_bytes()) for path in paths)]
    view = transform(size=(64, 64), seed=5)
    return [digest(view(image, f"key-{i}", v)) for i, image in enumerate(images) for v in (0, 1)]


@pytest.fixture(scope="module")
def elsewhere(some_photos):
    """What another process, with other global seeds, finds: of a picture, then of photos if any."""
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


def test_same_pixels_in_another_process(elsewhere):
    assert elsewhere[:2] == pixels_of_some()


def test_same_pixels_of_photos_in_another_process(elsewhere, photos, some_photos):
    assert elsewhere == pixels_of_some(some_photos)
    assert len(set(elsewhere)) == 2 * (len(some_photos) + 1) > 10


def test_pixels_do_not_depend_on_the_global_state_nor_change_it():
    view, image = transform(), picture()
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
    view, image = transform(), picture()
    forth = [view(image, "k", i) for i in range(4)]
    back = [view(image, "k", i) for i in reversed(range(4))]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))


def half_and_half():
    """Left half black, right half white: a flip shows."""
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (20, 0, 40, 40))
    return image


def flipped(pixels):
    return bool(pixels[..., 0].mean() > pixels[..., -1].mean())


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


def test_whole_image_where_nothing_is_cropped():
    image = picture(3, (32, 32))
    view = transform(size=(32, 32), flip=0.0, crop_scale=(1.0, 1.0))
    whole = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 * 2 - 1
    same = [torch.allclose(view(image, f"{i}", 0), whole) for i in range(30)]
    assert any(same)  # where the drawn aspect ratio doesn't fit, the largest fitting crop comes


@pytest.mark.parametrize("scale", [(0.2, 0.3), (0.8, 1.0)])
def test_crops_have_the_area_that_was_asked_for(scale):
    """Each crop of a ramp shows, by its range of values, which part of the width it covers."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=-1))
    view = transform(size=(32, 32), flip=0.0, crop_scale=scale)
    areas = []
    for i in range(100):
        red, green, _ = (view(image, f"{i}", 0) + 1) / 2
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


def test_height_comes_before_width_and_pixels_are_normalised():
    white = Image.new("RGB", (50, 50), "white")
    view = ViewTransform(Views(), (24, 16), "bilinear", (0.0, 0.5, 1.0), (1.0, 0.5, 0.25))
    pixels = view(white, "k", 0)
    assert pixels.shape == (3, 24, 16) and pixels.dtype == torch.float32
    assert pixels.mean((1, 2)).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_images_of_any_shape_have_views(size):
    pixels = transform()(picture(size=size), "k", 0)
    assert pixels.shape == (3, 24, 16) and bool(pixels.isfinite().all())
