"""Orders are a file a block, made again on their own."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.mlps import mlps
from dgmr.params import Ordering
from dgmr.prune import gram_schmidt_order, orders, saliency
from dgmr.prune.gram_schmidt import gram_schmidt

BLOCKS = ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny.write_teacher(tmp_path_factory.mktemp("deep") / "teacher", tiny.vit(depth=3))


def compute(folder, teacher, part=0, **changes):
    orders.compute(teacher, Ordering(**changes), part, folder)


@pytest.fixture
def folder(tmp_path, deep):
    compute(tmp_path / "orders", deep)
    return tmp_path / "orders"


def hash_of(teacher):
    return artefact.provenance(teacher)["sha256"]


def changed_by(action, folder):
    """Names of the block files that ``action`` writes, by their modification time."""
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    action()
    return [
        path.stem
        for path in sorted(folder.glob("*.safetensors"))
        if before.get(path.name) != path.stat().st_mtime_ns
    ]


def assert_right(folder, teacher, width=64):
    found = orders.load(folder, hash_of(teacher))
    expected = mlps(artefact.load(teacher))
    assert found.keys() == expected.keys()
    for name, order in found.items():
        weight = expected[name].module.fc1.weight
        assert torch.equal(order.indices, gram_schmidt_order(weight, width))
        # Squared residual norms over the sum of the rows' squared norms.
        squares = gram_schmidt(weight, width).residual_norms.square()
        expected_gains = squares / weight.detach().double().square().sum()
        torch.testing.assert_close(order.gains, expected_gains, rtol=1e-12, atol=0)


def test_orders_reach_as_far_as_max_ratio(folder, deep):
    assert_right(folder, deep, width=64)
    part = read_json(folder / "part-0-of-1.json")
    assert part["blocks"] == BLOCKS
    assert part["origin"]["weights_sha256"] == hash_of(deep)


def test_orders_end_with_the_neurons(tmp_path, deep):
    compute(tmp_path, deep, max_ratio=100.0)
    assert_right(tmp_path, deep, width=128)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_deal_the_blocks_out(tmp_path, deep, folder, parts):
    for part in range(parts):
        compute(tmp_path / "parts", deep, part, parts=parts)
    listed = [read_json(tmp_path / "parts" / f"part-{p}-of-{parts}.json") for p in range(parts)]
    assert sorted(block for part in listed for block in part["blocks"]) == BLOCKS
    for block in BLOCKS:
        name = f"{block}.safetensors"
        assert (tmp_path / "parts" / name).read_bytes() == (folder / name).read_bytes()


def test_nothing_is_made_twice(folder, deep):
    assert changed_by(lambda: compute(folder, deep), folder) == []
    assert changed_by(lambda: compute(folder, deep, parts=2), folder) == []


@pytest.mark.parametrize(
    "change", [{"method": "magnitude"}, {"seed": 1}, {"max_ratio": 1.5}, {"tokens": None}]
)
def test_another_way_makes_all_again(folder, deep, change):
    assert changed_by(lambda: compute(folder, deep, **change), folder) == BLOCKS
    assert changed_by(lambda: compute(folder, deep, **change), folder) == []


def cut(path, _tmp_path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path, _tmp_path):
    path.write_bytes(b"")


def delete(path, _tmp_path):
    path.unlink()


def foreign(path, tmp_path):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1, depth=3))
    compute(tmp_path / "foreign", other)
    path.write_bytes((tmp_path / "foreign" / path.name).read_bytes())


@pytest.mark.parametrize("spoil", [cut, empty, delete, foreign])
def test_a_spoilt_file_is_made_again_alone(tmp_path, folder, deep, spoil):
    spoil(folder / "blocks.1.mlp.safetensors", tmp_path)
    changed = changed_by(lambda: compute(folder, deep), folder)
    assert changed == ["blocks.1.mlp"]
    assert_right(folder, deep)


@pytest.mark.parametrize("spoil", [cut, empty, foreign])
def test_a_spoilt_file_is_not_loaded(tmp_path, folder, deep, spoil):
    spoil(folder / "blocks.1.mlp.safetensors", tmp_path)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.safetensors is damaged or an order of"):
        orders.load(folder, hash_of(deep))


def test_another_teacher_makes_all_again(tmp_path, folder, deep):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1, depth=3))
    with pytest.raises(DgmrError, match="delete it and run snakemake again"):
        orders.load(folder, hash_of(other))
    assert changed_by(lambda: compute(folder, other), folder) == BLOCKS
    assert_right(folder, other)


def test_only_the_first_layer_of_missing_blocks_is_read(folder, deep, monkeypatch):
    from dgmr import weights

    read = []
    plain = weights.tensors

    def watched(path, names, *more):
        names = list(names)
        read.extend(names)
        return plain(path, names, *more)

    monkeypatch.setattr(weights, "tensors", watched)
    compute(folder, deep, parts=2)
    assert read == []
    for name in ("blocks.1.mlp", "blocks.2.mlp"):
        (folder / f"{name}.safetensors").unlink()
    compute(folder, deep, parts=2)
    assert read == ["blocks.2.mlp.fc1.weight"]


def test_features_of_another_teacher_are_refused(tmp_path, deep, features):
    config = Ordering(method="output_gram_schmidt")
    with pytest.raises(DgmrError, match="results/features was made by another teacher"):
        orders.compute(deep, config, 0, tmp_path / "orders", features)
    assert not (tmp_path / "orders").exists()


@pytest.mark.parametrize("method", ["output_gram_schmidt", "active_energy", "taylor", "random"])
def test_other_methods_get_what_they_look_at(tmp_path, teacher, data, features, method):
    saliency.compute(teacher, data, tiny.features_config(), 0, tmp_path / "scores")
    config = Ordering(method=method, max_ratio=1.0)
    orders.compute(teacher, config, 0, tmp_path / "orders", features, tmp_path / "scores")
    found = orders.load(tmp_path / "orders", hash_of(teacher))
    assert [len(order.indices.unique()) for order in found.values()] == [32, 32]
    shallow = gram_schmidt_order(mlps(artefact.load(teacher))["blocks.0.mlp"].module.fc1.weight, 32)
    assert not torch.equal(found["blocks.0.mlp"].indices, shallow)


def test_weights_that_cannot_be_ordered_are_named(tmp_path):
    model = tiny.vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    teacher = tiny.write_teacher(tmp_path / "teacher", model)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp: weight holds NaN"):
        compute(tmp_path / "orders", teacher)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp: holds NaN"):
        compute(tmp_path / "orders", teacher, method="magnitude")
