"""Cached targets are what the live teacher says of the same pixels."""

import json

import pytest
import tiny
import torch
from dgmr import artefact, targets
from dgmr.distill.pairs import Pairs
from dgmr.errors import DgmrError
from dgmr.features import publish
from dgmr.features.targets import compute
from dgmr.files import ORIGIN, read_json
from dgmr.models import outputs
from dgmr.params import Views
from dgmr.shards import ShardedImages
from dgmr.views import ViewTransform
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity

SHARDS = ["00000", "00001", "00002"]
FIRST = {"00000": 0, "00002": tiny.COUNTS[0]}  # sample of a shard's first row


def run(folder, teacher, data, shards=SHARDS, **changes):
    compute(teacher, data, shards, tiny.features_config(**changes), folder)
    return {path.name: load_file(path) for path in sorted(folder.iterdir())}


@torch.inference_mode()
def live(teacher, shard, view, batch_size):
    """What the teacher says of a shard's view, from the pictures themselves."""
    model = artefact.load(teacher)
    transform = ViewTransform.for_model(model, Views.model_validate(tiny.VIEWS))
    first = FIRST[shard]
    indices = range(first, first + tiny.COUNTS[SHARDS.index(shard)])
    pixels = [transform(tiny.image(index), f"sample-{index}", view) for index in indices]
    said = [outputs(model, batch) for batch in torch.stack(pixels).split(batch_size)]
    return [torch.cat(parts) for parts in zip(*said, strict=True)]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_float32_targets_equal_the_live_teacher(tmp_path, teacher, data, batch_size):
    found = run(tmp_path / "targets", teacher, data, batch_size=batch_size)
    # A file a shard and view, but none of the empty shard.
    assert list(found) == [f"{s}.view{v}.safetensors" for s in ("00000", "00002") for v in (0, 1)]
    for shard in FIRST:
        for view in (0, 1):
            pooled, patch_tokens = live(teacher, shard, view, batch_size)
            tensors = found[f"{shard}.view{view}.safetensors"]
            assert torch.equal(tensors["pooled"], pooled)
            assert torch.equal(tensors["patch_tokens"], patch_tokens)


def test_views_are_not_the_same(tmp_path, teacher, data):
    found = run(tmp_path / "targets", teacher, data)
    first, second = (found[f"00000.view{view}.safetensors"]["pooled"] for view in (0, 1))
    assert (first - second).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize(("name", "cosine"), [("bfloat16", 0.9999), ("float16", 0.999999)])
def test_half_precision_targets_are_the_rounded_ones(tmp_path, teacher, data, name, cosine):
    found = run(tmp_path / "targets", teacher, data, ["00000"], dtype=name)
    tensors = found["00000.view1.safetensors"]
    expected = live(teacher, "00000", 1, batch_size=4)
    for stored, value in zip((tensors["pooled"], tensors["patch_tokens"]), expected, strict=True):
        assert stored.dtype == targets.dtype(name)
        assert torch.equal(stored, value.to(stored.dtype))
        assert cosine_similarity(stored.float(), value, dim=-1).min() >= cosine


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


@pytest.mark.parametrize("family", ["registers", "swin", "attention pool"])
def test_other_families_have_targets_too(tmp_path, data, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.FAMILIES[family]())
    found = run(tmp_path / "targets", teacher, data, ["00002"])["00002.view0.safetensors"]
    pooled, patch_tokens = live(teacher, "00002", 0, batch_size=4)
    assert patch_tokens.shape == (4, 16, 32)
    assert torch.equal(found["pooled"], pooled)
    assert torch.equal(found["patch_tokens"], patch_tokens)


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


def test_published_files_are_found_until_they_are_damaged(tmp_path, teacher, data):
    room = tiny.write_features(tmp_path, teacher, data, tiny.features_config())
    manifest = targets.Manifest(room)
    manifest.check_teacher(artefact.provenance(teacher)["sha256"])
    shard = ShardedImages(data).shards[2]
    path = manifest.target(shard, 1)
    assert path.name == "00002.view1.safetensors"
    tiny.damage(path)
    with pytest.raises(DgmrError, match=r"00002\.view1\.safetensors is missing or is not the file"):
        manifest.target(shard, 1)
    with pytest.raises(DgmrError, match=r"00002\.view1\.safetensors is missing or is not the file"):
        Pairs(data, room, artefact.load(teacher))


def test_targets_know_the_shard_they_were_made_of(tmp_path, teacher, features):
    other = tiny.write_data(tmp_path / "data", first=100)
    with pytest.raises(DgmrError, match="another shard 00000 than the data room holds"):
        Pairs(other, features, artefact.load(teacher))


def test_metrics_count_files_and_bytes(features):
    work = features.parent / "work"
    sizes = {
        kind: [path.stat().st_size for path in (work / kind).iterdir()]
        for kind in ("targets", "calibration")
    }
    assert read_json(features / "metrics.json") == {
        "target_files": 4,
        "target_bytes": sum(sizes["targets"]),
        "calibration_files": 2,
        "calibration_bytes": sum(sizes["calibration"]),
    }


def test_another_teacher_s_files_are_not_published(tmp_path, data, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    work = features.parent / "work"
    with pytest.raises(DgmrError, match="made by another teacher than results/teacher holds"):
        publish.publish(
            other,
            [work / "targets"],
            work / "calibration",
            tiny.features_config(),
            tmp_path / "room",
        )
    assert not (tmp_path / "room").exists()


def test_files_say_what_they_were_made_from(features, teacher, data):
    origin = {"teacher_sha256": artefact.provenance(teacher)["sha256"]}
    shard = {"shard_sha256": ShardedImages(data).shards[0].sha256}
    work = features.parent / "work"
    with safe_open(work / "targets" / "00000.view0.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[ORIGIN]) == origin | shard
    with safe_open(work / "calibration" / "blocks.0.mlp.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()[ORIGIN]) == origin
