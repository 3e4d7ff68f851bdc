"""The student's artefact tells what was kept, and of which parent."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.models import evaluation_transform, mlps
from dgmr.prune import orders, prune_model, refits
from dgmr.prune.assemble import assemble

RATIO = 0.75


@pytest.fixture(scope="module")
def work(tmp_path_factory, teacher, features):
    folder = tmp_path_factory.mktemp("prune")
    orders.compute(teacher, 2.0, 0, 1, folder / "orders")
    for part in range(2):
        ordered = folder / "orders"
        refits.compute(teacher, ordered, features, RATIO, 1e-3, part, 2, folder / "refits")
    return folder


def test_plain_student_is_prune_model_s(tmp_path, work, teacher):
    assemble(teacher, work / "orders", [], RATIO, tmp_path / "pruned")
    expected = prune_model(artefact.load(teacher), RATIO)
    found = artefact.load(tmp_path / "pruned")
    assert torch.equal(found(tiny.pixels()), expected(tiny.pixels()))
    about = artefact.provenance(tmp_path / "pruned")
    assert about["parent_sha256"] == artefact.provenance(teacher)["sha256"]
    assert (about["ratio"], about["compensate"]) == (RATIO, "none")
    assert about["widths"] == {"blocks.0.mlp": 24, "blocks.1.mlp": 24}


def test_compensated_student_has_the_refits(tmp_path, work, teacher):
    parts = sorted((work / "refits").glob("part-*.json"))
    assemble(teacher, work / "orders", parts, RATIO, tmp_path / "pruned")
    errors = read_json(parts[0]) | read_json(parts[1])
    loaded = refits.load(work / "refits", errors)
    plain = mlps(prune_model(artefact.load(teacher), RATIO))
    for name, mlp in mlps(artefact.load(tmp_path / "pruned")).items():
        assert torch.equal(mlp.fc1.weight, plain[name].fc1.weight)
        assert torch.equal(mlp.fc2.weight, loaded[name].weight)
        assert torch.equal(mlp.fc2.bias, loaded[name].bias)
    blocks = read_json(tmp_path / "pruned" / "blocks.json")
    order_of = orders.load(work / "orders", artefact.provenance(teacher)["sha256"])
    assert blocks == {
        name: {"hidden_features": 128, "kept": 24, **errors[name]}
        | {"residual_norms": order_of[name].residual_norms.tolist()}
        for name in plain
    }
    assert artefact.provenance(tmp_path / "pruned")["compensate"] == "least_squares"


def test_compensation_brings_the_outputs_closer(tmp_path, work, teacher):
    assemble(teacher, work / "orders", [], RATIO, tmp_path / "plain")
    parts = sorted((work / "refits").glob("part-*.json"))
    assemble(teacher, work / "orders", parts, RATIO, tmp_path / "refitted")
    dense = artefact.load(teacher)
    images = torch.stack([tiny_pixels(dense, index) for index in range(6)])
    expected = dense.forward_features(images)
    errors = [
        (artefact.load(tmp_path / name).forward_features(images) - expected).square().mean()
        for name in ("refitted", "plain")
    ]
    assert errors[0] < 0.7 * errors[1]


def tiny_pixels(model, index):
    return evaluation_transform(model)(tiny.image(index))


def test_orders_of_another_teacher_are_refused(tmp_path, work):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    with pytest.raises(DgmrError, match="an order of other weights"):
        assemble(other, work / "orders", [], RATIO, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
