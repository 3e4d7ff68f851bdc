"""Orders are a file a block, made again on their own."""

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.models import mlps
from dgmr.prune import gram_schmidt_order, orders

BLOCKS = ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.write_teacher(tmp_path_factory.mktemp("deep") / "teacher", tiny.vit(depth=3))


@pytest.fixture
def folder(tmp_path, teacher):
    orders.compute(teacher, 2.0, 0, 1, tmp_path / "orders")
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
        expected_order = gram_schmidt_order(expected[name].fc1.weight, width)
        assert torch.equal(order.indices, expected_order)
        assert order.residual_norms.shape == (width,)


def test_orders_reach_as_far_as_max_ratio(folder, teacher):
    assert_right(folder, teacher, width=64)
    part = read_json(folder / "part-0-of-1.json")
    assert part["blocks"] == BLOCKS
    assert part["origin"]["weights_sha256"] == hash_of(teacher)


def test_orders_end_with_the_neurons(tmp_path, teacher):
    orders.compute(teacher, 100.0, 0, 1, tmp_path)
    assert_right(tmp_path, teacher, width=128)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_deal_the_blocks_out(tmp_path, teacher, folder, parts):
    for part in range(parts):
        orders.compute(teacher, 2.0, part, parts, tmp_path / "parts")
    listed = [read_json(tmp_path / "parts" / f"part-{p}-of-{parts}.json") for p in range(parts)]
    assert sorted(block for part in listed for block in part["blocks"]) == BLOCKS
    for block in BLOCKS:
        name = f"{block}.safetensors"
        assert (tmp_path / "parts" / name).read_bytes() == (folder / name).read_bytes()


def test_nothing_is_made_twice(folder, teacher):
    assert changed_by(lambda: orders.compute(teacher, 2.0, 0, 1, folder), folder) == []


def cut(path, _tmp_path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path, _tmp_path):
    path.write_bytes(b"")


def delete(path, _tmp_path):
    path.unlink()


def foreign(path, tmp_path):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1, depth=3))
    orders.compute(other, 2.0, 0, 1, tmp_path / "foreign")
    path.write_bytes((tmp_path / "foreign" / path.name).read_bytes())


@pytest.mark.parametrize("spoil", [cut, empty, delete, foreign])
def test_a_spoilt_file_is_made_again_alone(tmp_path, folder, teacher, spoil):
    spoil(folder / "blocks.1.mlp.safetensors", tmp_path)
    changed = changed_by(lambda: orders.compute(teacher, 2.0, 0, 1, folder), folder)
    assert changed == ["blocks.1.mlp"]
    assert_right(folder, teacher)


@pytest.mark.parametrize("spoil", [cut, empty, foreign])
def test_a_spoilt_file_is_not_loaded(tmp_path, folder, teacher, spoil):
    spoil(folder / "blocks.1.mlp.safetensors", tmp_path)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.safetensors is damaged or an order of"):
        orders.load(folder, hash_of(teacher))


def test_another_teacher_or_reach_makes_all_again(tmp_path, folder, teacher):
    assert changed_by(lambda: orders.compute(teacher, 1.5, 0, 1, folder), folder) == BLOCKS
    assert_right(folder, teacher, width=48)
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1, depth=3))
    with pytest.raises(DgmrError, match="delete it and run snakemake again"):
        orders.load(folder, hash_of(other))
    assert changed_by(lambda: orders.compute(other, 1.5, 0, 1, folder), folder) == BLOCKS
    assert_right(folder, other, width=48)


def test_only_fc1_of_missing_blocks_is_read(folder, teacher, monkeypatch):
    read = []
    plain = orders.safe_open

    class Watched:
        def __init__(self, path, framework):
            self.file = plain(path, framework=framework)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(orders, "safe_open", Watched)
    orders.compute(teacher, 2.0, 0, 2, folder)
    assert read == []
    for name in ("blocks.1.mlp", "blocks.2.mlp"):
        (folder / f"{name}.safetensors").unlink()
    orders.compute(teacher, 2.0, 0, 2, folder)
    assert read == ["blocks.2.mlp.fc1.weight"]


def test_weights_that_cannot_be_ordered_are_named(tmp_path):
    model = tiny.vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    teacher = tiny.write_teacher(tmp_path / "teacher", model)
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.fc1\.weight: weight holds NaN"):
        orders.compute(teacher, 2.0, 0, 1, tmp_path / "orders")
