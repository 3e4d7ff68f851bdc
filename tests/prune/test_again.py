"""Pruning on, between stages of distillation: against doing it by hand with the library."""

import pytest
import timm
import tiny
import torch
from dgmr import artefact, loader
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.images import calibration_images
from dgmr.mlps import mlps, widths
from dgmr.models import outputs
from dgmr.params import Prune, StagePrune
from dgmr.prune import orders, prune_model
from dgmr.prune.again import prune_again
from dgmr.prune.model import Refit
from safetensors.torch import load_file

RIDGE = 1e-3
ALL = 10**6


def config(**changes):
    return Prune(**({"ratio": 1.5, "ridge": RIDGE, "compensate": "none"} | changes))


def section():
    """Every token of 18 images counts, so that none is drawn."""
    calibrated = {"samples": 18, "tokens": ALL}
    return tiny.features_config(calibration=calibrated, views={"count": 1}, batch_size=5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("again") / "data", (18,))


class Case:
    """A teacher with its orders, and a parent: pruned to some widths, then trained."""

    def __init__(self, folder, pictures, model, first):
        self.folder, self.pictures = folder, pictures
        self.teacher = tiny.write_teacher(folder / "teacher", model)
        self.orders = folder / "orders"
        orders.compute(self.teacher, config(max_ratio=2.0), 0, self.orders)
        dense = artefact.load(self.teacher)
        wanted = widths(dense) | first
        student = prune_model(dense, hidden_features=wanted, orders=self.order_of())
        self.parent = folder / "parent"
        artefact.save(self.parent, tiny.perturb(student, 0.02, seed=5), {"stage": "distill"})

    def order_of(self):
        found = orders.load(self.orders, artefact.provenance(self.teacher)["sha256"])
        return {name: order.indices for name, order in found.items()}

    def again(self, name, stage, **changes):
        output = self.folder / name
        rooms = self.parent, self.teacher, self.orders, self.pictures, section()
        prune_again(*rooms, config(**changes), StagePrune(**stage), output)
        return output

    def kept(self, wanted):
        """The first of the teacher's order of a dense MLP; the first of a pruned one."""
        dense, found = widths(artefact.load(self.teacher)), widths(artefact.load(self.parent))
        order_of, kept = self.order_of(), {}
        for name, width in wanted.items():
            units = order_of[name] if found[name] == dense[name] else torch.arange(found[name])
            kept[name] = units[:width] if width < found[name] else torch.arange(width)
        return kept


@pytest.fixture(scope="module")
def vit(tmp_path_factory, pictures):
    """The first block is dense still, the second pruned to 48."""
    return Case(tmp_path_factory.mktemp("vit"), pictures, tiny.vit(), {"blocks.1.mlp": 48})


def assert_same_bits(folder, expected):
    found, wanted = load_file(folder / "model.safetensors"), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def sliced(case, wanted):
    """Each MLP's tensors indexed by hand, all others as they were."""
    parent = artefact.load(case.parent)
    state, kept = parent.state_dict(), case.kept(wanted)
    for name, units in kept.items():
        for key in ("fc1.weight", "fc1.bias"):
            state[f"{name}.{key}"] = state[f"{name}.{key}"][units]
        state[f"{name}.fc2.weight"] = state[f"{name}.fc2.weight"][:, units]
    return state


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"ratio": 1.0}, [32, 32]),
        ({"ratio": 1.5}, [48, 48]),  # the second stays
        ({"ratio": 1.0, "blocks": [0, 0]}, [32, 48]),
        ({"ratio": 1.0, "blocks": [1, 1]}, [128, 32]),
    ],
)
def test_a_plain_slice_is_exact(vit, tmp_path, stage, expected):
    vit.folder = tmp_path
    folder = vit.again("out", stage)
    wanted = dict(zip(("blocks.0.mlp", "blocks.1.mlp"), expected, strict=True))
    state, found = sliced(vit, wanted), load_file(folder / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    about = artefact.provenance(folder)
    assert about["parent_sha256"] == artefact.provenance(vit.parent)["sha256"]
    assert (about["stage"], about["compensate"]) == ("prune again", "none")
    assert about["widths"] == wanted == widths(artefact.load(folder))
    assert read_json(folder / "blocks.json") == {
        name: {"hidden_features": before, "kept": wanted[name]}
        for name, before in (("blocks.0.mlp", 128), ("blocks.1.mlp", 48))
    }


def test_slices_of_slices_are_the_slice(vit, tmp_path):
    """From the teacher at once, or in two steps that train nothing: the same units, in one order."""
    vit.folder = tmp_path
    untrained = Case(tmp_path / "untrained", vit.pictures, tiny.vit(), {})
    artefact.save(untrained.parent, artefact.load(untrained.teacher), {})
    once = untrained.again("once", {"ratio": 0.5})
    untrained.parent = untrained.again("first", {"ratio": 1.25})
    twice = untrained.again("second", {"ratio": 0.5})
    assert_same_bits(twice, artefact.load(once))
    assert_same_bits(
        once, prune_model(artefact.load(untrained.teacher), 0.5, orders=untrained.order_of())
    )


def test_results_that_are_not_uniform_carry_their_loader(vit, tmp_path):
    vit.folder = tmp_path
    uneven = vit.again("uneven", {"ratio": 0.5, "blocks": [0, 0]})
    assert (uneven / "loader.py").is_file()
    assert widths(loader.load(uneven)) == {"blocks.0.mlp": 16, "blocks.1.mlp": 48}
    even = vit.again("even", {"ratio": 1.0})
    assert not (even / "loader.py").exists()
    timm.create_model(f"local-dir:{even}", pretrained=True)


def test_widths_are_rounded_as_all_are(vit, tmp_path):
    vit.folder = tmp_path
    folder = vit.again("out", {"ratio": 0.7}, round_to=16)  # 22 -> 32
    assert set(widths(artefact.load(folder)).values()) == {32}
    # Never to more than there are.
    folder = vit.again("more", {"ratio": 1.5}, round_to=32)
    assert widths(artefact.load(folder)) == {"blocks.0.mlp": 64, "blocks.1.mlp": 48}


@pytest.mark.parametrize(
    ("changes", "stage", "expected"),
    [
        ({}, {"ratio": 1.0}, [32, 32]),
        ({"include_pool_head": False}, {"ratio": 1.0}, [32, 86]),
        ({}, {"ratio": 1.0, "blocks": [0, 0]}, [32, 86]),  # a pool head is no block
    ],
)
def test_a_pool_head_shrinks_where_it_is_included(tmp_path, pictures, changes, stage, expected):
    case = Case(tmp_path, pictures, tiny.siglip(), {"blocks.0.mlp": 64})
    folder = case.again("out", stage, **changes)
    wanted = dict(zip(("blocks.0.mlp", "attn_pool.mlp"), expected, strict=True))
    assert widths(artefact.load(folder)) == wanted
    state, found = sliced(case, wanted), load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)


def ridge_refit(mlp, units, wanted, inputs):
    """fc2 of the kept units by plain normal equations in double precision, means taken out."""
    kept = mlp.pruned(units)
    hidden = kept.hidden(inputs).flatten(0, -2).double()
    lost = (wanted - kept.module(inputs)).flatten(0, -2).double()
    h, y = hidden - hidden.mean(0), lost - lost.mean(0)
    covariance = h.T @ h / len(h)
    damping = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    weight = torch.linalg.solve(covariance + damping, h.T @ y / len(h))
    bias = lost.mean(0) - hidden.mean(0) @ weight
    fc2 = kept.module.fc2
    return Refit((fc2.weight + weight.T).float(), (fc2.bias + bias).float())


@torch.inference_mode()
def by_hand(case, wanted):
    """Block after block: on what the pruned model gives, towards what the parent's MLP says."""
    parent, student = artefact.load(case.parent), artefact.load(case.parent)
    images = torch.cat(list(calibration_images(case.pictures, parent, section())))
    kept = case.kept(wanted)
    refits = {}
    for name, mlp in mlps(parent).items():
        if wanted[name] == mlp.hidden_features:
            continue
        said = tiny.put_out(mlp.module, parent, images)
        given = tiny.given(student.get_submodule(name), student, images)
        refits[name] = ridge_refit(mlp, kept[name], said, given)
        pruned = mlp.pruned(kept[name]).module
        pruned.fc2.load_state_dict(refits[name]._asdict())
        above, _, last = name.rpartition(".")
        setattr(student.get_submodule(above), last, pruned)
    return prune_model(parent, hidden_features=wanted, orders=kept, refits=refits), images


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"ratio": 1.0}, [32, 32]),
        ({"ratio": 0.75, "blocks": [0, 0]}, [24, 48]),
        ({"ratio": 0.75, "blocks": [1, 1]}, [128, 24]),
    ],
)
def test_refits_are_the_ridge_regression_on_its_own_inputs(vit, tmp_path, stage, expected):
    vit.folder = tmp_path
    folder = vit.again("out", stage, compensate="least_squares")
    wanted = dict(zip(("blocks.0.mlp", "blocks.1.mlp"), expected, strict=True))
    student, images = by_hand(vit, wanted)
    found = artefact.load(folder)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        pairs = zip(outputs(found, images), outputs(student, images), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    before = {"blocks.0.mlp": 128, "blocks.1.mlp": 48}
    for name, block in read_json(folder / "blocks.json").items():
        shrinks = wanted[name] < before[name]
        assert (block["hidden_features"], block["kept"]) == (before[name], wanted[name])
        assert (block.keys() > {"ridge", "error_plain", "error_refit"}) == shrinks
        assert not shrinks or (
            block["ridge"] == RIDGE and block["error_refit"] < block["error_plain"]
        )
    assert artefact.provenance(folder)["compensate"] == "least_squares"


@torch.inference_mode()
def test_a_refit_loses_less_of_the_parents_features(vit, tmp_path):
    vit.folder = tmp_path
    parent = artefact.load(vit.parent)
    # Pictures that no refit has seen.
    fresh = tiny.write_data(tmp_path / "fresh", (8,), first=100)
    images = torch.cat(list(calibration_images(fresh, parent, section())))
    expected = outputs(parent, images).patch_tokens
    errors = {}
    for way in ("none", "least_squares"):
        student = artefact.load(vit.again(way, {"ratio": 0.75}, compensate=way))
        errors[way] = float((outputs(student, images).patch_tokens - expected).square().mean())
    assert errors["least_squares"] < 0.8 * errors["none"]


@pytest.mark.parametrize("family", ["swin", "packed", "gated with norm"])
def test_other_families_shrink_further(tmp_path, pictures, family):
    model = tiny.FAMILIES[family]()
    first = {name: int(1.6 * mlp.in_features) for name, mlp in mlps(model).items()}
    case = Case(tmp_path, pictures, model, first)
    folder = case.again("plain", {"ratio": 0.8})
    wanted = {name: int(0.8 * mlp.in_features) for name, mlp in mlps(model).items()}
    parent, kept = artefact.load(case.parent), case.kept(wanted)
    assert_same_bits(folder, prune_model(parent, hidden_features=wanted, orders=kept))
    refitted = case.again("refitted", {"ratio": 0.8}, compensate="least_squares")
    assert widths(artefact.load(refitted)) == wanted


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        (
            {"ratio": 1.75},
            {},
            r"blocks\.1\.mlp would keep 56 hidden units, but it has only 48 left",
        ),
        (
            {"ratio": 1, "blocks": [1, 2]},
            {},
            r"there are no blocks 1 to 2; the student's are 0 to 1",
        ),
        ({"ratio": 0.01}, {}, r"would keep 0 hidden units"),
        (
            {"ratio": 3.0, "blocks": [0, 0]},
            {},
            r"would keep 96 hidden units, but prune\.max_ratio 2 orders only 64",
        ),
    ],
)
def test_what_cannot_be_is_refused(vit, tmp_path, stage, changes, says):
    vit.folder = tmp_path
    with pytest.raises(DgmrError, match=says):
        vit.again("out", stage, **changes)
    assert not list(tmp_path.iterdir())


def test_orders_of_another_teacher_are_refused(vit, tmp_path):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    with pytest.raises(DgmrError, match="an order of other weights than the teacher's"):
        rooms = vit.parent, other, vit.orders, vit.pictures, section()
        prune_again(*rooms, config(), StagePrune(ratio=1.0), tmp_path / "out")


def test_nothing_is_left_beside_the_result(vit, tmp_path):
    vit.folder = tmp_path / "rooms"
    vit.again("out", {"ratio": 1.0}, compensate="least_squares")
    assert [path.name for path in vit.folder.iterdir()] == ["out"]
