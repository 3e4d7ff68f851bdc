"""Whatever timm can load becomes a teacher, if it can be pruned."""

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.teacher.convert import convert
from timm.models import save_for_hf


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_local_folder_becomes_the_same_model(tmp_path, family):
    model = tiny.FAMILIES[family]()
    source = tmp_path / "source"
    save_for_hf(model, str(source), safe_serialization=True)
    convert(f"local-dir:{source}", tmp_path / "teacher")
    assert torch.equal(artefact.load(tmp_path / "teacher")(tiny.pixels()), model(tiny.pixels()))
    found = artefact.provenance(tmp_path / "teacher")
    assert (found["stage"], found["source"]) == ("teacher", f"local-dir:{source}")


@pytest.mark.parametrize("name", ["vit_of_nowhere", "local-dir:/no/such/folder", "seresnet18"])
def test_what_timm_cannot_load_is_one_sentence(tmp_path, name):
    with pytest.raises(DgmrError, match=f"teacher.model: {name} cannot be loaded: ."):
        convert(name, tmp_path / "teacher")
    assert not list(tmp_path.iterdir())


def test_mlps_that_cannot_be_pruned_are_refused_at_once(tmp_path):
    small = {"img_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 2}
    gated = timm.create_model("eva02_tiny_patch14_224", **small)
    save_for_hf(gated, str(tmp_path / "source"), safe_serialization=True)
    with pytest.raises(DgmrError, match=r"eva02_tiny_patch14_224: blocks\.0\.mlp is a"):
        convert(f"local-dir:{tmp_path / 'source'}", tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()
