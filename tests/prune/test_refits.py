"""Refits are a file a block: on the teacher's own calibration inputs, or block after block."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.images import calibration_images
from dgmr.mlps import mlps
from dgmr.models import outputs
from dgmr.params import Prune
from dgmr.prune import orders, refits
from dgmr.prune.compensate import LeastSquares
from dgmr.prune.model import prune_model
from safetensors.torch import load_file

RIDGE = 1e-3
FAMILIES = {
    "plain": tiny.vit,
    "without bias": lambda: tiny.vit(proj_bias=False),
    "gated with norm": tiny.eva02,
    "packed": tiny.dinov2,
    "swin": tiny.swin,
    "attention pool": tiny.siglip,
}


def config(**changes):
    return Prune(**({"ratio": 1.5, "ridge": RIDGE} | changes))


def write_orders(folder, teacher):
    orders.compute(teacher, config(), 0, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Enough that some are held out."""
    return tiny.write_data(tmp_path_factory.mktemp("refits") / "data", (18,))


def section(**changes):
    calibrated = {"samples": 18, "tokens": 9} | changes
    return tiny.features_config(calibration=calibrated, views={"count": 1}, batch_size=5)


class Case:
    """A teacher, its orders and its features room."""

    def __init__(self, folder, model, pictures):
        self.teacher = tiny.write_teacher(folder / "teacher", model)
        self.features = tiny.write_features(folder, self.teacher, pictures, section())
        self.orders = write_orders(folder / "orders", self.teacher)
        self.pictures = pictures

    def parallel(self, folder, part=0, **changes):
        chosen = config(**changes)
        refits.compute(self.teacher, self.orders, self.features, chosen, part, folder)
        return read_json(folder / f"part-{part}-of-{chosen.parts}.json")

    def sequential(self, folder, features=None, **changes):
        chosen = config(sequential=True, **changes)
        features = features or section()
        refits.compute_sequential(
            self.teacher, self.orders, self.pictures, features, chosen, folder
        )
        return read_json(folder / "part-0-of-1.json")

    def kept(self, name, width):
        order_of = orders.load(self.orders, artefact.provenance(self.teacher)["sha256"])
        return order_of[name].indices[:width]

    def calibration(self, name):
        path = self.features.parent / "work" / "calibration" / f"{name}.safetensors"
        return load_file(path)["inputs"]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory, pictures):
    return Case(tmp_path_factory.mktemp("family"), FAMILIES[request.param](), pictures)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, pictures):
    return Case(tmp_path_factory.mktemp("plain"), tiny.vit(depth=3), pictures)


def held_out(images):
    return torch.tensor([image % 8 == 7 for image in range(images)])


def by_hand(mlp, kept, wanted, inputs, ridge=RIDGE):
    """From what the dense MLP puts out and the pruned one gets, both ``[images, tokens, N]``."""
    pruned = mlp.pruned(kept)
    squares = LeastSquares(len(kept), mlp.out_features, mlp.has_bias)
    for out in (False, True):
        chosen = held_out(len(inputs)) == out
        hidden = pruned.hidden(inputs[chosen]).flatten(0, -2)
        output = wanted[chosen].flatten(0, -2)
        squares.add(hidden, output - pruned.output(hidden), output, out)
    found = squares.solve(ridge)
    return found, found.applied(pruned.module.fc2.weight, pruned.module.fc2.bias)


def assert_refit(folder, about, name, found, refit, loosely=False):
    stored = load_file(folder / f"{name}.safetensors")
    assert stored.keys() == ({"weight"} if refit.bias is None else {"weight", "bias"})
    near = {"rtol": 1e-3, "atol": 1e-4} if loosely else {"rtol": 1e-5, "atol": 1e-6}
    for key, tensor in stored.items():
        torch.testing.assert_close(tensor, getattr(refit, key), **near)
    assert about[name].keys() == {"ridge", "error_plain", "error_refit"}
    for key, value in about[name].items():
        assert value == pytest.approx(getattr(found, key), rel=1e-2 if loosely else 1e-4)
    assert found.error_refit < found.error_plain


@torch.inference_mode()
def test_a_block_is_refitted_on_its_own_inputs(tmp_path, case):
    about = case.parallel(tmp_path)
    dense = mlps(artefact.load(case.teacher))
    assert list(about) == list(dense)
    for name, mlp in dense.items():
        width = int(1.5 * mlp.in_features)
        inputs = case.calibration(name)
        found, refit = by_hand(mlp, case.kept(name, width), mlp.module(inputs), inputs)
        assert refit.weight.shape == (mlp.out_features, width)
        assert_refit(tmp_path, about, name, found, refit)


def test_ridge_is_chosen_by_block_where_none_is_given(tmp_path, plain):
    about = plain.parallel(tmp_path, ridge=None)
    for name, mlp in mlps(artefact.load(plain.teacher).requires_grad_(False)).items():
        inputs = plain.calibration(name)
        found, refit = by_hand(mlp, plain.kept(name, 48), mlp.module(inputs), inputs, ridge=None)
        assert found.ridge != RIDGE
        assert_refit(tmp_path, about, name, found, refit, loosely=True)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_together_are_one(tmp_path, plain, parts):
    whole = plain.parallel(tmp_path / "whole")
    together = {}
    for part in range(parts):
        together |= plain.parallel(tmp_path / "parts", part, parts=parts)
    assert together == whole and len(whole) == 3
    for name in whole:
        found = (tmp_path / "parts" / f"{name}.safetensors").read_bytes()
        assert found == (tmp_path / "whole" / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("way", ["parallel", "sequential"])
def test_mlps_that_keep_all_have_no_refit(tmp_path, plain, way):
    widths = {"ratio": None, "hidden_features": {"blocks.1.mlp": 20}}
    about = getattr(plain, way)(tmp_path, **widths)
    assert list(about) == ["blocks.1.mlp"]
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["blocks.1.mlp"]


def times(folder):
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("way", ["parallel", "sequential"])
def test_what_is_there_is_not_made_again(tmp_path, plain, way):
    before = getattr(plain, way)(tmp_path), times(tmp_path)
    again = getattr(plain, way)(tmp_path), times(tmp_path)
    assert again == before and len(before[1]) == 3


@pytest.mark.parametrize("way", ["parallel", "sequential"])
def test_a_refit_of_other_weights_or_a_cut_one_is_made_again(tmp_path, plain, pictures, way):
    whole = getattr(plain, way)(tmp_path / "whole")
    other = Case(tmp_path / "other", tiny.vit(seed=1, depth=3), pictures)
    folder = tmp_path / "refits"
    getattr(other, way)(folder)
    assert getattr(plain, way)(folder) == whole
    cut = folder / "blocks.1.mlp.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    assert getattr(plain, way)(folder) == whole
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


@pytest.mark.parametrize("finished", [1, 2])
def test_sequential_goes_on_where_it_was_killed(tmp_path, plain, finished):
    whole = plain.sequential(tmp_path / "whole")
    part = tmp_path / "part"
    part.mkdir()
    for name in list(whole)[:finished]:
        content = (tmp_path / "whole" / f"{name}.safetensors").read_bytes()
        (part / f"{name}.safetensors").write_bytes(content)
    before = times(part)
    assert plain.sequential(part) == whole
    assert times(part) | before == times(part)
    for name in whole:
        file = f"{name}.safetensors"
        assert (part / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@torch.inference_mode()
def test_sequential_is_the_student_run_block_by_block(tmp_path, case):
    """All tokens count here, so that none is drawn: teacher and student side by side, with hooks."""
    everything = section(tokens=10**6)
    about = case.sequential(tmp_path, everything)
    teacher, student = (artefact.load(case.teacher) for _ in range(2))
    images = torch.cat(list(calibration_images(case.pictures, teacher, everything)))
    dense = mlps(teacher)
    assert list(about) == list(dense)
    for name, mlp in dense.items():
        said = tiny.put_out(mlp.module, teacher, images)
        given = tiny.given(student.get_submodule(name), student, images)
        kept = case.kept(name, int(1.5 * mlp.in_features))
        found, refit = by_hand(mlp, kept, said, given)
        assert_refit(tmp_path, about, name, found, refit, loosely=True)
        # From here on the student has this block's refit.
        pruned = mlp.pruned(kept).module
        stored = load_file(tmp_path / f"{name}.safetensors")
        pruned.fc2.load_state_dict(stored)
        parent, _, last = name.rpartition(".")
        setattr(student.get_submodule(parent), last, pruned)


def test_first_block_is_the_same_either_way(tmp_path, pictures):
    case = Case(tmp_path, tiny.vit(), pictures)
    everything = section(tokens=10**6)
    features = tiny.write_features(tmp_path / "all", case.teacher, pictures, everything)
    case.features = features
    parallel, sequential = (
        case.parallel(tmp_path / "p"),
        case.sequential(tmp_path / "s", everything),
    )
    first, second = parallel
    near = {"rtol": 1e-3, "atol": 1e-4}
    for name, same in ((first, True), (second, False)):
        weights = [load_file(tmp_path / f / f"{name}.safetensors")["weight"] for f in "ps"]
        assert torch.allclose(*weights, **near) == same
    assert sequential[first] == pytest.approx(parallel[first], rel=1e-2)


def test_tokens_limits_what_sequential_looks_at(tmp_path, monkeypatch, plain):
    seen = []
    add = refits._add
    monkeypatch.setattr(refits, "_add", lambda *a: (seen.append(len(a[3])), add(*a)))
    for tokens in (3, 10**6):
        seen.clear()
        plain.sequential(tmp_path / str(tokens), section(tokens=tokens))
        assert sum(seen) == 3 * 18 * min(tokens, 17)


@torch.inference_mode()
def test_sequential_brings_the_features_closer(tmp_path, pictures):
    case = Case(tmp_path, tiny.vit(depth=4), pictures)
    everything = section(tokens=10**6)
    case.features = tiny.write_features(tmp_path / "all", case.teacher, pictures, everything)
    dense = artefact.load(case.teacher)
    images = torch.cat(list(calibration_images(case.pictures, dense, everything)))
    wanted = outputs(dense, images).patch_tokens
    kept = {name: case.kept(name, 32) for name in mlps(dense)}
    errors = {}
    for way, more in (("parallel", ()), ("sequential", (everything,))):
        about = getattr(case, way)(tmp_path / way, *more, ratio=1.0)
        student = prune_model(
            dense, 1.0, orders=kept, refits=refits.Refits(tmp_path / way, list(about))
        )
        errors[way] = float((outputs(student, images).patch_tokens - wanted).square().mean())
    plain = outputs(prune_model(dense, 1.0, orders=kept), images).patch_tokens
    assert errors["sequential"] < errors["parallel"]
    assert errors["parallel"] < float((plain - wanted).square().mean())


def test_features_of_another_teacher_are_refused(tmp_path, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    ordered = write_orders(tmp_path / "orders", other)
    with pytest.raises(DgmrError, match="results/features was made by another teacher"):
        refits.compute(other, ordered, features, config(), 0, tmp_path / "refits")
    assert not (tmp_path / "refits").exists()


def test_orders_of_another_teacher_are_refused(tmp_path, teacher, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    ordered = write_orders(tmp_path / "orders", other)
    with pytest.raises(DgmrError, match="an order of other weights than the teacher's"):
        refits.compute(teacher, ordered, features, config(), 0, tmp_path / "refits")


def test_damaged_calibration_is_refused(tmp_path, pictures):
    case = Case(tmp_path, tiny.vit(), pictures)
    tiny.damage(tmp_path / "work" / "calibration" / "blocks.1.mlp.safetensors")
    case.parallel(tmp_path / "refits", part=0, parts=2)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.safetensors is missing or is not"):
        case.parallel(tmp_path / "refits", part=1, parts=2)
