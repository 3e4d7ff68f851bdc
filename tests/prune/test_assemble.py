"""The student's artefact tells what was kept, and of which parent."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.mlps import widths
from dgmr.models import evaluation_transform, outputs
from dgmr.params import Prune
from dgmr.prune import orders, prune_model, refits
from dgmr.prune.assemble import assemble
from safetensors.torch import load_file

RATIO = 0.75


def config(**changes):
    return Prune(**({"ratio": RATIO, "ridge": 1e-3, "parts": 2} | changes))


@pytest.fixture(scope="module")
def work(tmp_path_factory, teacher, data):
    folder = tmp_path_factory.mktemp("prune")
    calibrated = {"samples": 9, "tokens": 17}
    room = tiny.write_features(folder, teacher, data, tiny.features_config(calibration=calibrated))
    orders.compute(teacher, config(parts=1), 0, folder / "orders")
    for part in range(2):
        refits.compute(teacher, folder / "orders", room, config(), part, folder / "refits")
    return folder


def parts(work):
    return sorted((work / "refits").glob("part-*.json"))


def order_of(work, teacher):
    return orders.load(work / "orders", artefact.provenance(teacher)["sha256"])


def assert_same_bits(folder, expected):
    """The stored student is ``expected``, tensor by tensor."""
    found, wanted = load_file(folder / "model.safetensors"), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {t.dtype for t in found.values()} == {t.dtype for t in wanted.values()}


def test_plain_student_is_prune_model_s(tmp_path, work, teacher):
    assemble(teacher, work / "orders", [], config(compensate="none"), tmp_path / "pruned")
    dense = artefact.load(teacher)
    assert_same_bits(tmp_path / "pruned", prune_model(dense, RATIO))
    about = artefact.provenance(tmp_path / "pruned")
    assert about["parent_sha256"] == artefact.provenance(teacher)["sha256"]
    assert (about["method"], about["compensate"]) == ("gram_schmidt", "none")
    assert about["widths"] == {"blocks.0.mlp": 24, "blocks.1.mlp": 24}
    assert widths(artefact.load(tmp_path / "pruned")) == about["widths"]


def test_compensated_student_is_prune_model_s_with_the_refits(tmp_path, work, teacher):
    assemble(teacher, work / "orders", parts(work), config(), tmp_path / "pruned")
    errors = read_json(parts(work)[0]) | read_json(parts(work)[1])
    assert list(errors) == ["blocks.0.mlp", "blocks.1.mlp"]
    loaded = refits.Refits(work / "refits", list(errors))
    dense, found = artefact.load(teacher), order_of(work, teacher)
    indices = {name: order.indices for name, order in found.items()}
    assert_same_bits(tmp_path / "pruned", prune_model(dense, RATIO, orders=indices, refits=loaded))
    assert read_json(tmp_path / "pruned" / "blocks.json") == {
        name: {"hidden_features": 128, "kept": 24, "gains": order.gains.tolist(), **errors[name]}
        for name, order in found.items()
    }
    assert artefact.provenance(tmp_path / "pruned")["compensate"] == "least_squares"


def test_widths_may_differ_and_dense_mlps_stay(tmp_path, work, teacher):
    wanted = {"blocks.0.mlp": 128, "blocks.1.mlp": 20}
    knobs = {"ratio": None, "hidden_features": {"blocks.1.mlp": 20}, "compensate": "none"}
    assemble(teacher, work / "orders", [], config(**knobs), tmp_path / "pruned")
    dense = artefact.load(teacher)
    assert_same_bits(tmp_path / "pruned", prune_model(dense, hidden_features=wanted))
    assert (tmp_path / "pruned" / "loader.py").is_file()
    blocks = read_json(tmp_path / "pruned" / "blocks.json")
    assert {name: block["kept"] for name, block in blocks.items()} == wanted


@pytest.mark.parametrize("family", ["swin", "attention pool", "packed", "gated with norm"])
def test_other_families_are_prune_model_s_too(tmp_path, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.FAMILIES[family]())
    chosen = config(ratio=1.3, compensate="none", parts=1)
    orders.compute(teacher, chosen, 0, tmp_path / "orders")
    assemble(teacher, tmp_path / "orders", [], chosen, tmp_path / "pruned")
    assert_same_bits(tmp_path / "pruned", prune_model(artefact.load(teacher), 1.3))


def test_bfloat16_teachers_have_bfloat16_students(tmp_path, work, data):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.vit().bfloat16())
    room = tiny.write_features(
        tmp_path, teacher, data, tiny.features_config(calibration={"samples": 9})
    )
    chosen = config(parts=1)
    orders.compute(teacher, chosen, 0, tmp_path / "orders")
    refits.compute(teacher, tmp_path / "orders", room, chosen, 0, tmp_path / "refits")
    assemble(teacher, tmp_path / "orders", parts(tmp_path), chosen, tmp_path / "pruned")
    indices = {name: order.indices for name, order in order_of(tmp_path, teacher).items()}
    loaded = refits.Refits(tmp_path / "refits", list(indices))
    dense = tiny.vit().bfloat16()
    expected = prune_model(dense, RATIO, orders=indices, refits=loaded)
    assert {p.dtype for p in expected.parameters()} == {torch.bfloat16}
    assert_same_bits(tmp_path / "pruned", expected)


@torch.inference_mode()
def test_compensation_brings_the_outputs_closer(tmp_path, work, teacher):
    assemble(teacher, work / "orders", [], config(compensate="none"), tmp_path / "plain")
    assemble(teacher, work / "orders", parts(work), config(), tmp_path / "refitted")
    dense = artefact.load(teacher)
    images = torch.stack([evaluation_transform(dense)(tiny.image(index)) for index in range(6)])
    expected = outputs(dense, images).patch_tokens
    errors = [
        (outputs(artefact.load(tmp_path / name), images).patch_tokens - expected).square().mean()
        for name in ("refitted", "plain")
    ]
    assert errors[0] < 0.7 * errors[1]


def test_orders_of_another_teacher_are_refused(tmp_path, work):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    with pytest.raises(DgmrError, match="an order of other weights"):
        assemble(other, work / "orders", [], config(), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()
