"""Cached outputs: only the files that the manifest lists are read, row by row."""

import dataclasses
import json
import pickle

import pytest
import tiny
import torch
from dgmr import targets
from dgmr.errors import DgmrError
from dgmr.files import sha256
from dgmr.shards import Shard
from safetensors.torch import save_file

SHARD = Shard("00000", 4, 100, "shard-hash")


@pytest.fixture
def tensors():
    return {"pooled": torch.randn(4, 3), "patch_tokens": torch.randn(4, 5, 3).bfloat16()}


@pytest.fixture
def room(tmp_path, tensors):
    """A features room of one targets file and one calibration file."""
    paths = {"targets": tmp_path / "00000.view1.safetensors"}
    paths["calibration"] = tmp_path / "blocks.0.mlp.safetensors"
    save_file(tensors, paths["targets"])
    save_file({"inputs": torch.randn(2, 3)}, paths["calibration"])
    listed = {
        kind: {path.name: {"path": str(path), "sha256": sha256(path), "shard_sha256": SHARD.sha256}}
        for kind, path in paths.items()
    }
    about = {"teacher_sha256": "t1", "views": {"count": 2}}
    (tmp_path / "manifest.json").write_text(json.dumps(about | listed))
    return tmp_path


def test_manifest_gives_verified_paths(room):
    manifest = targets.Manifest(room)
    assert manifest.target(SHARD, 1) == room / "00000.view1.safetensors"
    assert manifest.calibration("blocks.0.mlp") == room / "blocks.0.mlp.safetensors"
    assert manifest.views == {"count": 2}
    manifest.check_teacher("t1")


def test_missing_manifest_says_what_to_run(tmp_path):
    with pytest.raises(DgmrError, match="run the features stage first"):
        targets.Manifest(tmp_path)


def test_unlisted_files_are_refused(room):
    manifest = targets.Manifest(room)
    with pytest.raises(DgmrError, match=r"00000\.view0\.safetensors is not among the targets"):
        manifest.target(SHARD, 0)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.safetensors is not among the calib"):
        manifest.calibration("blocks.1.mlp")


@pytest.mark.parametrize("spoil", [tiny.damage, lambda path: path.unlink()])
def test_damaged_and_missing_files_are_refused(room, spoil):
    manifest = targets.Manifest(room)
    for path in room.glob("*.safetensors"):
        spoil(path)
    with pytest.raises(DgmrError, match=r"00000\.view1\.safetensors is missing or is not the file"):
        manifest.target(SHARD, 1)
    with pytest.raises(DgmrError, match=r"blocks\.0\.mlp\.safetensors is missing or is not"):
        manifest.calibration("blocks.0.mlp")


def test_targets_of_other_images_are_refused(room):
    other = dataclasses.replace(SHARD, sha256="another")
    with pytest.raises(DgmrError, match="another shard 00000 than the data room holds"):
        targets.Manifest(room).target(other, 1)


def test_features_of_another_teacher_are_refused(room):
    with pytest.raises(DgmrError, match="made by another teacher"):
        targets.Manifest(room).check_teacher("t2")


def test_read_gives_the_row_as_stored(room, tensors):
    opened = targets.Targets({("00000", 1): room / "00000.view1.safetensors"})
    for row in (3, 0, 2):
        said = opened.read("00000", row, 1)
        assert torch.equal(said.pooled, tensors["pooled"][row])
        assert torch.equal(said.patch_tokens, tensors["patch_tokens"][row])
        assert said.patch_tokens.dtype == torch.bfloat16
    with pytest.raises(KeyError):
        opened.read("00000", 0, 0)


def test_read_again_in_a_process_that_got_a_copy(room, tensors):
    opened = targets.Targets({("00000", 1): room / "00000.view1.safetensors"})
    opened.read("00000", 0, 1)
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 - our own bytes
    assert torch.equal(copy.read("00000", 1, 1).pooled, tensors["pooled"][1])


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype_by_name(name):
    assert str(targets.dtype(name)) == f"torch.{name}"
