"""Refits are a file a block, from the teacher's own calibration inputs."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.models import mlps
from dgmr.prune import orders, refits
from dgmr.prune.assemble import assemble
from dgmr.prune.compensate import LeastSquares
from safetensors.torch import load_file

BLOCKS = ["blocks.0.mlp", "blocks.1.mlp"]
RIDGE = 1e-3


@pytest.fixture(scope="module")
def ordered(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("prune") / "orders"
    orders.compute(teacher, 2.0, 0, 1, folder)
    return folder


def run(folder, teacher, ordered, features, part=0, parts=1, ratio=1.5):
    refits.compute(teacher, ordered, features, ratio, RIDGE, part, parts, folder)
    return folder / f"part-{part}-of-{parts}.json"


def test_a_block_is_refitted_on_its_own_inputs(tmp_path, teacher, ordered, features):
    errors = read_json(run(tmp_path / "refits", teacher, ordered, features))
    loaded = refits.load(tmp_path / "refits", errors)
    assert list(loaded) == BLOCKS
    order_of = orders.load(ordered, artefact.provenance(teacher)["sha256"])
    for name, mlp in mlps(artefact.load(teacher)).items():
        kept = order_of[name].indices[:48]
        squares = LeastSquares(mlp.requires_grad_(False), kept)
        inputs = features.parent / "work" / "calibration" / f"{name}.safetensors"
        squares.add(load_file(inputs)["inputs"])
        expected = squares.solve(RIDGE)
        assert torch.equal(loaded[name].weight, expected.weight)
        assert torch.equal(loaded[name].bias, expected.bias)
        assert loaded[name][2:] == expected[2:]
        assert loaded[name].error_refit < loaded[name].error_plain


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_together_are_one(tmp_path, teacher, ordered, features, parts):
    whole = read_json(run(tmp_path / "whole", teacher, ordered, features))
    together = {}
    for part in range(parts):
        together |= read_json(run(tmp_path / "parts", teacher, ordered, features, part, parts))
    assert together == whole
    for name in BLOCKS:
        found = (tmp_path / "parts" / f"{name}.safetensors").read_bytes()
        assert found == (tmp_path / "whole" / f"{name}.safetensors").read_bytes()


def test_mlps_without_biases_have_none_after(tmp_path, data):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.vit(proj_bias=False))
    features = tiny.write_features(tmp_path, teacher, data, tiny.features_config())
    orders.compute(teacher, 2.0, 0, 1, tmp_path / "orders")
    errors = run(tmp_path / "refits", teacher, tmp_path / "orders", features)
    assert all(
        refit.bias is None for refit in refits.load(errors.parent, read_json(errors)).values()
    )
    assemble(teacher, tmp_path / "orders", [errors], 1.5, tmp_path / "pruned")
    assert "blocks.0.mlp.fc2.bias" not in artefact.load(tmp_path / "pruned").state_dict()


def test_features_of_another_teacher_are_refused(tmp_path, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    orders.compute(other, 2.0, 0, 1, tmp_path / "orders")
    with pytest.raises(DgmrError, match="results/features was made by another teacher"):
        run(tmp_path / "refits", other, tmp_path / "orders", features)
    assert not (tmp_path / "refits").exists()


def test_orders_of_another_teacher_are_refused(tmp_path, teacher, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    orders.compute(other, 2.0, 0, 1, tmp_path / "orders")
    with pytest.raises(DgmrError, match="an order of other weights than the teacher's"):
        run(tmp_path / "refits", teacher, tmp_path / "orders", features)


def test_damaged_calibration_is_refused(tmp_path, teacher, ordered, data):
    features = tiny.write_features(tmp_path, teacher, data, tiny.features_config())
    tiny.damage(tmp_path / "work" / "calibration" / "blocks.1.mlp.safetensors")
    run(tmp_path / "refits", teacher, ordered, features, part=0, parts=2)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.safetensors is missing or is not"):
        run(tmp_path / "refits", teacher, ordered, features, part=1, parts=2)
