"""Cached targets are what the live teacher says of the same pixels."""

import errno
import json
import shutil
from collections import namedtuple

import pytest
import timm
import tiny
import torch
from conftest import REPOSITORY
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.features import targets as room
from dgmr.features.targets import compute
from dgmr.files import ORIGIN
from dgmr.models import outputs
from dgmr.params import Views
from dgmr.shards import Sample, ShardedImages, write_manifest, write_shard
from dgmr.views import ViewTransform
from pictures import encoded, picture
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

SHARDS = ["00000", "00001", "00002"]
FIRST = {"00000": 0, "00002": tiny.COUNTS[0]}  # sample of a shard's first row
DEMO = REPOSITORY / "resources" / "teachers" / "fashion-vit"


def run(folder, teacher, data, shards=SHARDS, **changes):
    compute(teacher, data, shards, tiny.features_config(**changes), folder)
    return {path.name: load_file(path) for path in sorted(folder.iterdir())}


def pixels_of(model, shard, view):
    """From the pictures themselves: uint8."""
    transform = ViewTransform.for_model(model, Views.model_validate(tiny.VIEWS))
    indices = (FIRST[shard] + row for row in range(tiny.COUNTS[SHARDS.index(shard)]))
    return torch.stack([transform(tiny.image(i), f"sample-{i}", view) for i in indices])


@torch.inference_mode()
def live(teacher, shard, view, batch_size=4, block=1):
    """What the teacher says of a shard's view: pooled, patch tokens, and what ``block`` gives."""
    model = artefact.load(teacher)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    normalised = (pixels_of(model, shard, view) / 255 - mean) / std
    tokens = []
    if hasattr(model, "blocks"):
        model.blocks[block].register_forward_hook(lambda _m, _i, output: tokens.append(output))
    said = [outputs(model, batch) for batch in normalised.split(batch_size)]
    return *(torch.cat(parts) for parts in zip(*said, strict=True)), torch.cat(tokens or [mean])


@pytest.mark.parametrize("batch_size", [2, 5])
def test_float32_targets_equal_the_live_teacher(tmp_path, teacher, data, batch_size):
    found = run(tmp_path / "targets", teacher, data, batch_size=batch_size, blocks=(0,))
    # A file a shard and view, but none of the empty shard.
    assert list(found) == [f"{s}.view{v}.safetensors" for s in ("00000", "00002") for v in (0, 1)]
    for shard in FIRST:
        for view in (0, 1):
            pooled, patch_tokens, block = live(teacher, shard, view, batch_size, block=0)
            tensors = found[f"{shard}.view{view}.safetensors"]
            assert set(tensors) == {"pooled", "patch_tokens", "blocks.0", "pixels"}
            assert torch.equal(tensors["pooled"], pooled)
            assert torch.equal(tensors["patch_tokens"], patch_tokens)
            assert torch.equal(tensors["blocks.0"], block)
            assert torch.equal(tensors["pixels"], pixels_of(artefact.load(teacher), shard, view))


def test_views_are_not_the_same(tmp_path, teacher, data):
    found = run(tmp_path / "targets", teacher, data)
    first, second = (found[f"00000.view{view}.safetensors"]["pooled"] for view in (0, 1))
    assert (first - second).abs().amax(1).min() > 1e-3


def test_only_what_is_asked_for_is_there(tmp_path, teacher, data):
    pooled, patch_tokens, block = live(teacher, "00000", 1)
    asked = {"pixels": False, "patch_tokens": None}
    found = run(tmp_path / "little", teacher, data, **asked)["00000.view1.safetensors"]
    assert set(found) == {"pooled"} and torch.equal(found["pooled"], pooled)
    asked = {"pixels": False, "patch_tokens": 3, "blocks": (1,)}
    found = run(tmp_path / "some", teacher, data, **asked)["00000.view1.safetensors"]
    assert set(found) == {"pooled", "patch_tokens", "blocks.1"}
    assert torch.equal(found["patch_tokens"], patch_tokens[:, [0, 3, 6, 9, 12, 15]])
    assert torch.equal(found["blocks.1"], block)


def test_bfloat16_targets_are_the_rounded_ones(tmp_path, teacher, data):
    found = run(tmp_path / "targets", teacher, data, ["00000"], dtype="bfloat16", blocks=(1,))
    tensors = found["00000.view1.safetensors"]
    names = ("pooled", "patch_tokens", "blocks.1")
    for name, value in zip(names, live(teacher, "00000", 1), strict=True):
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name], value.to(torch.bfloat16))
    assert tensors["pixels"].dtype == torch.uint8


def test_a_forward_pass_in_bfloat16_is_nearly_the_same(tmp_path, teacher, data):
    one = run(tmp_path / "half", teacher, data, ["00000"], precision="bfloat16", blocks=(1,))
    tensors = one["00000.view1.safetensors"]
    names = ("pooled", "patch_tokens", "blocks.1")
    for name, value in zip(names, live(teacher, "00000", 1), strict=True):
        assert tensors[name].dtype == torch.float32  # on disk, as features.dtype says
        assert not torch.equal(tensors[name], value)
        assert cosine_similarity(tensors[name], value, dim=-1).min() > 0.999


def test_batch_size_changes_rounding_at_most(tmp_path, teacher, data):
    alone = run(tmp_path / "alone", teacher, data, batch_size=1)
    together = run(tmp_path / "together", teacher, data, batch_size=64)
    for name, tensors in alone.items():
        for key, value in tensors.items():
            torch.testing.assert_close(value, together[name][key], rtol=1e-5, atol=1e-5)


def test_jobs_of_fewer_shards_write_the_same(tmp_path, teacher, data):
    whole = run(tmp_path / "whole", teacher, data)
    parts = run(tmp_path / "a", teacher, data, ["00002"])
    parts |= run(tmp_path / "b", teacher, data, ["00000", "00001"])
    assert parts.keys() == whole.keys()
    for path in (tmp_path / "whole").iterdir():
        part = "a" if path.name.startswith("00002") else "b"
        assert path.read_bytes() == (tmp_path / part / path.name).read_bytes()


def test_a_job_of_an_empty_shard_has_no_files(tmp_path, teacher, data):
    assert run(tmp_path / "targets", teacher, data, ["00001"]) == {}


@pytest.mark.parametrize("family", ["registers", "swin", "attention pool"])
def test_other_families_have_targets_too(tmp_path, data, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.FAMILIES[family]())
    found = run(tmp_path / "targets", teacher, data, ["00002"])["00002.view0.safetensors"]
    pooled, patch_tokens, _ = live(teacher, "00002", 0, block=0)
    assert patch_tokens.shape == (4, 16, 32)
    assert torch.equal(found["pooled"], pooled)
    assert torch.equal(found["patch_tokens"], patch_tokens)


def test_files_are_written_batch_by_batch(tmp_path, teacher, data, monkeypatch):
    """Rows in the order of the passes, no more of them than a pass has."""
    events = []

    class Watched(room.Rows):
        def add(self, rows):
            events.append(("rows", {len(tensor) for tensor in rows.values()}))
            super().add(rows)

    class Asked(room.Answers):
        def forward(self, images):
            events.append(("pass", {len(images)}))
            return super().forward(images)

    monkeypatch.setattr(room, "Rows", Watched)
    monkeypatch.setattr(room, "Answers", Asked)
    run(tmp_path / "targets", teacher, data, ["00000"], batch_size=2)
    a_view = [(what, {count}) for count in (2, 2, 1) for what in ("pass", "rows")]
    assert events == a_view * 2


def test_a_damaged_shard_or_teacher_is_refused(tmp_path, teacher):
    data = tiny.write_data(tmp_path / "data")
    tiny.damage(data / "00000.tar")
    with pytest.raises(DgmrError, match=r"00000\.tar is not the shard"):
        run(tmp_path / "targets", teacher, data)
    copy = tiny.write_teacher(tmp_path / "teacher")
    tiny.damage(copy / "model.safetensors")
    with pytest.raises(DgmrError, match="model.safetensors is not the file"):
        run(tmp_path / "targets", copy, data, ["00002"])
    assert not (tmp_path / "targets").exists()


# The disk


def a_disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda p: asked.append(p) or usage(9e9, 0, free))
    return asked


def test_a_disk_too_small_is_told_before_the_teacher_is_asked(tmp_path, teacher, data, monkeypatch):
    wanted = sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in written(tmp_path / "all", teacher, data)
    )
    with monkeypatch.context() as patched:
        patched.setattr(room, "Answers", None)  # it would be called
        asked = a_disk(patched, free=wanted - 1)
        with pytest.raises(DgmrError) as error:
            run(tmp_path / "new" / "targets", teacher, data)
    assert asked == [tmp_path]  # the folders on the way are not there yet
    told = f"{wanted / 1000:.3g} kB"
    assert str(error.value) == (
        f"features: the targets take {told}, but the disk of {tmp_path / 'new' / 'targets'} has"
        f" {told} left: lower features.views.count, ask for fewer patch_tokens or blocks, or choose"
        " features.cache: none."
    )
    assert not (tmp_path / "new").exists()
    a_disk(monkeypatch, free=wanted)
    assert len(run(tmp_path / "new" / "targets", teacher, data)) == 4


def written(folder, teacher, data):
    run(folder, teacher, data)
    return list(folder.iterdir())


def test_a_disk_that_is_full_amid_the_work_leaves_nothing(tmp_path, teacher, data, monkeypatch):
    class Full(room.Rows):
        def close(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "Rows", Full)
    with pytest.raises(DgmrError, match="No space left"):
        run(tmp_path / "targets", teacher, data)
    assert list(tmp_path.iterdir()) == []


def test_files_say_what_they_were_made_from(features, teacher, data):
    sha256 = artefact.provenance(teacher)["sha256"]
    work = features.parent / "work"
    with safe_open(work / "targets" / "00002.view0.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()[ORIGIN])
    transform = ViewTransform.for_model(artefact.load(teacher), Views.model_validate(tiny.VIEWS))
    assert found == {
        "teacher_sha256": sha256,
        "transform": json.loads(json.dumps(transform.about())),
        "asked": {
            "patch_tokens": 1,
            "blocks": [],
            "dtype": "float32",
            "pixels": True,
            "precision": "float32",
        },
        "shard_sha256": ShardedImages(data).shards[2].sha256,
    }
    with safe_open(work / "calibration" / "blocks.0.mlp.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[ORIGIN]) == {"teacher_sha256": sha256}


# Real images, in bfloat16: what training will see of the teacher.


def least_cosine(tmp_path, teacher, data, blocks=()):
    """Of any image, between its targets on disk and the live teacher; by name of the answer."""
    asked = {"dtype": "bfloat16", "blocks": blocks, "batch_size": 32, "views": {"count": 1}}
    (tensors,) = run(tmp_path / "targets", teacher, data, ["00000"], **asked).values()
    images = ShardedImages(data)
    model = artefact.load(teacher)
    transform = ViewTransform.for_model(model, Views())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    tokens = {}
    for index in blocks:
        model.blocks[index].register_forward_hook(
            lambda _m, _i, output, name=f"blocks.{index}": tokens.__setitem__(name, output)
        )
    worst = {}
    assert len(images) == 64
    for row, key in enumerate(images.keys):
        pixels = transform(images.image(row), key, 0)
        assert torch.equal(tensors["pixels"][row], pixels)
        with torch.inference_mode():
            said = outputs(model, ((pixels / 255 - mean) / std)[None])
        for name, value in (said._asdict() | tokens).items():
            cosine = cosine_similarity(tensors[name][row].float().flatten(), value.flatten(), dim=0)
            worst[name] = min(worst.get(name, 1.0), float(cosine))
    return worst


def shard_of(folder, images, extension):
    folder.mkdir()
    content = (Sample(f"{i:09d}", image, extension) for i, image in enumerate(images))
    write_manifest(folder, [write_shard(folder, "00000", content)])
    return folder


def test_targets_of_the_demo_teacher_point_where_it_does(tmp_path):
    gray = (encoded(picture(index, (28, 28), "L")) for index in range(64))
    data = shard_of(tmp_path / "data", gray, "png")
    worst = least_cosine(tmp_path, DEMO, data, blocks=(2,))
    assert set(worst) == {"pooled", "patch_tokens", "blocks.2"}
    assert min(worst.values()) >= 0.9999, worst


def test_targets_of_photos_point_where_the_teacher_does(tmp_path, photos):
    torch.manual_seed(0)
    teacher = tiny.write_teacher(tmp_path / "teacher", timm.create_model("vit_tiny_patch16_224"))
    paths = sorted(photos.glob("*.JPEG"))[:64]
    data = shard_of(tmp_path / "data", (path.read_bytes() for path in paths), "jpg")
    worst = least_cosine(tmp_path, teacher, data)
    assert set(worst) == {"pooled", "patch_tokens"} and min(worst.values()) >= 0.9999, worst
