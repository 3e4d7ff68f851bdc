"""A model folder says the same in a fresh process without dgmr: with its loader, or in plain timm."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import tiny
import torch
from dgmr import artefact, loader
from dgmr.mlps import mlps, widths
from dgmr.prune.model import prune_model
from safetensors.torch import load_file, save_file


def eva():
    """Gated MLPs (SwiGLU) with an inner norm."""
    small = {"img_size": tiny.SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    name, grid = "eva02_large_patch14_clip_224", (4, 4)
    return tiny.build(name, num_classes=tiny.CLASSES, ref_feat_shape=grid, **small)


def giant():
    """Gated MLPs whose gate and value are one layer (SwiGLUPacked); no classifier."""
    small = {"img_size": tiny.SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return tiny.build("vit_giant_patch14_reg4_dinov2", num_classes=0, **small)


FAMILIES = tiny.FAMILIES | {"gated with norm": eva, "packed": giant}

FRESH = """
import importlib, json, sys
from pathlib import Path

request = json.loads(sys.argv[1])
paths = list(sys.path)

import timm, torch
from safetensors.torch import load_file, save_file

images = load_file(request["images"])["images"]
for folder in map(Path, request["folders"]):
    sys.path[:] = [str(folder), *paths]
    with torch.inference_mode():
        found = {}
        if (folder / "loader.py").exists():
            sys.modules.pop("loader", None)
            loader = importlib.import_module("loader")
            assert Path(loader.__file__).parent == folder
            model = loader.load(folder)
            assert not model.training
        else:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            indices = tuple(range(request["depths"][folder.name]))
            features = timm.create_model(
                f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=indices
            )
            maps = features.eval()(images)
            found |= {f"map {index}": each for index, each in enumerate(maps)}
        found["output"] = model(images)
    found = {name: each.contiguous() for name, each in found.items()}
    save_file(found, folder / "found.safetensors")
assert not [name for name in sys.modules if name.partition(".")[0] == "dgmr"]
"""


def uneven(model):
    """Pruned to another width in every MLP."""
    wanted = {name: 7 + 5 * index for index, name in enumerate(widths(model))}
    return prune_model(model, hidden_features=wanted)


def even(model):
    return prune_model(model, ratio=1.25)


SHAPES = {"uneven": uneven, "even": even}
CASES = [(shape, family) for shape in SHAPES for family in FAMILIES]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Models and their folders by case, after one fresh process has run them all."""
    root = tmp_path_factory.mktemp("fresh")
    models, folders, depths = {}, {}, {}
    for shape, family in CASES:
        model = SHAPES[shape](FAMILIES[family]())
        folder = root / f"{shape}-{family.replace(' ', '-')}"
        artefact.save(folder, model, {})
        models[shape, family], folders[shape, family] = model, folder
        depths[folder.name] = len(model.feature_info)
    save_file({"images": tiny.pixels()}, root / "images.safetensors")
    request = {
        "images": str(root / "images.safetensors"),
        "folders": list(map(str, folders.values())),
        "depths": depths,
    }
    # Isolated: neither this folder nor PYTHONPATH is looked into.
    command = [sys.executable, "-I", "-W", "ignore", "-c", FRESH, json.dumps(request)]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return models, folders


@pytest.mark.parametrize(("shape", "family"), CASES)
def test_fresh_process_computes_the_same_bits(fresh, shape, family):
    models, folders = fresh
    model, folder = models[shape, family], folders[shape, family]
    assert (folder / "loader.py").exists() == (shape == "uneven")
    with torch.inference_mode():
        expected = model(tiny.pixels())
    assert torch.equal(load_file(folder / "found.safetensors")["output"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_features_only_gives_the_same_maps(fresh, family):
    models, folders = fresh
    model = models["even", family]
    found = load_file(folders["even", family] / "found.safetensors")
    with torch.inference_mode():
        maps = model.forward_intermediates(tiny.pixels(), intermediates_only=True)
    assert len(maps) == len(found) - 1 == len(model.feature_info)
    for index, expected in enumerate(maps):
        if family == "swin":  # features_only gives its maps as [B, H, W, D]
            expected = expected.permute(0, 2, 3, 1)
        assert torch.equal(found[f"map {index}"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_know_their_pruned_widths(fresh, family):
    models, folders = fresh
    loaded = loader.load(folders["uneven", family])
    expected = models["uneven", family]
    for module, other in zip(loaded.modules(), expected.modules(), strict=True):
        assert type(module) is type(other)
        assert module.extra_repr() == other.extra_repr()
    for index, mlp in enumerate(mlps(loaded).values()):
        assert mlp.hidden_features == mlp.module.fc2.in_features == 7 + 5 * index
        assert not mlp.has_norm or mlp.module.norm.normalized_shape == (7 + 5 * index,)


def test_loaded_model_can_be_trained(fresh):
    _, folders = fresh
    for family in FAMILIES:
        model = loader.load(folders["uneven", family]).train()
        model(tiny.pixels()).square().mean().backward()
        for mlp in mlps(model).values():
            assert all(parameter.grad is not None for parameter in mlp.module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_timm_refuses_what_needs_the_loader(fresh, family):
    _, folders = fresh
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{folders['uneven', family]}", pretrained=True)


def test_weights_of_another_model_are_refused(fresh, tmp_path):
    _, folders = fresh
    shutil.copytree(folders["uneven", "class token"], tmp_path / "mixed")
    shutil.copy(folders["uneven", "registers"] / "model.safetensors", tmp_path / "mixed")
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loader.load(tmp_path / "mixed")


def test_loader_has_at_most_40_lines():
    assert len(Path(loader.__file__).read_text().splitlines()) <= 40
