"""The model artefact: plain timm loads it, and nothing else passes for it."""

import hashlib
import json

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError


@pytest.fixture
def folder(tmp_path):
    artefact.save(tmp_path / "model", tiny.vit(), {"stage": "here"}, {"more.json": [1, 2]})
    return tmp_path / "model"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_timm_loads_the_same_bits(tmp_path, family):
    model = tiny.FAMILIES[family]()
    artefact.save(tmp_path / "model", model, {})
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    ours = artefact.load(tmp_path / "model")
    assert not ours.training
    for loaded in (plain, ours):
        assert torch.equal(loaded(tiny.pixels()), model(tiny.pixels()))
        assert loaded.pretrained_cfg["input_size"] == (3, tiny.SIDE, tiny.SIDE)
        assert loaded.pretrained_cfg["crop_pct"] == 1.0


def test_folder_holds_these_files_and_their_hash(folder):
    names = {"model.safetensors", "config.json", "provenance.json", "more.json"}
    assert {path.name for path in folder.iterdir()} == names
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert artefact.provenance(folder) == {"stage": "here", "sha256": digest}
    assert json.loads((folder / "more.json").read_text()) == [1, 2]


def test_equal_weights_give_equal_files(folder, tmp_path):
    artefact.save(tmp_path / "again", tiny.vit(), {"stage": "here"}, {"more.json": [1, 2]})
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_skeleton_has_the_structure_without_weights(folder):
    skeleton, whole = artefact.skeleton(folder), artefact.load(folder)
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {
        name: p.shape for name, p in whole.named_parameters()
    }
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not skeleton.training


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "provenance.json"])
def test_without_a_file_it_is_no_artefact(folder, name):
    (folder / name).unlink()
    for read in (artefact.provenance, artefact.load):
        with pytest.raises(DgmrError, match=f"{folder} is no model artefact: it has no {name}"):
            read(folder)


def test_one_changed_bit_is_refused(folder):
    tiny.damage(folder / "model.safetensors")
    for read in (artefact.provenance, artefact.load):
        with pytest.raises(DgmrError, match="model.safetensors is not the file"):
            read(folder)


def test_saving_again_replaces_the_whole_folder(folder):
    artefact.save(folder, tiny.vit(seed=1), {"stage": "later"})
    assert artefact.provenance(folder)["stage"] == "later"
    assert not (folder / "more.json").exists()
    expected = tiny.vit(seed=1)(tiny.pixels())
    assert torch.equal(artefact.load(folder)(tiny.pixels()), expected)


def test_a_failed_save_leaves_what_was_there(folder):
    before = artefact.provenance(folder)
    with pytest.raises(TypeError):
        artefact.save(folder, tiny.vit(seed=1), {}, {"bad.json": object()})
    assert artefact.provenance(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
