"""Weights on disk: written tensor by tensor, read from any kind of checkpoint, never by running code."""

import argparse
import hashlib
import json
import os
import pickle

import pytest
import torch
from dgmr import weights
from dgmr.errors import DgmrError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOATS += [torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def some(seed=0):
    """Tensors of all dtypes, and of all sorts of shapes; not in alphabetical order."""
    draw = torch.Generator().manual_seed(seed)
    found = {f"z.{kind}": torch.randn(3, 5, generator=draw).to(kind) for kind in FLOATS}
    found |= {f"y.{kind}": torch.randint(2, (2, 1, 7), generator=draw).to(kind) for kind in OTHERS}
    found |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "ü.weight": torch.ones(1)}
    return found | {"turned": torch.randn(4, 6, generator=draw).T, "part": torch.arange(9)[2:5]}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and raw(found[name]) == raw(tensor)
        for name, tensor in wanted.items()
    )


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refused(path):
    with pytest.raises(DgmrError) as error:
        weights.read(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


# Written


def test_the_official_reader_reads_what_was_written(path):
    digest = weights.write(path, some(), some().items())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same(load_file(path), some())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_order_on_disk_is_that_of_the_layout(path):
    weights.write(path, some(), some().items())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    assert list(json.loads(content[8 : 8 + length]))[1:] == list(some())


def test_own_readers(path):
    save_file({name: tensor.contiguous() for name, tensor in some().items()}, path)
    layout = weights.layout(path)
    assert all(tensor.is_meta for tensor in layout.values())
    assert {n: (t.shape, t.dtype) for n, t in layout.items()} == {
        n: (t.shape, t.dtype) for n, t in some().items()
    }
    names = ["scalar", "turned", "empty"]
    assert [name for name, _ in weights.tensors(path, names)] == names
    assert same(dict(weights.tensors(path, some())), some())
    assert same(weights.read(path), some())


def test_layout_may_be_on_the_meta_device_and_tensors_a_generator(path):
    layout = {name: tensor.to("meta") for name, tensor in some().items()}
    weights.write(path, layout, ((name, tensor) for name, tensor in some().items()))
    assert same(weights.read(path), some())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("b", torch.ones(2)), ("a", torch.ones(3))], r"b \[2\] .* comes where a \[3\]"),
        ([("a", torch.ones(1, 3)), ("b", torch.ones(2))], r"a \[1, 3\] .* comes where a \[3\]"),
        ([("a", torch.ones(3).half()), ("b", torch.ones(2))], "float16 comes where a .* .*float32"),
        ([("a", torch.ones(3))], "b did not come"),
        ([("a", torch.ones(3)), ("b", torch.ones(2)), ("c", torch.ones(1))], "no further tensor"),
    ],
)
def test_tensors_that_are_not_the_layouts(path, tensors, says):
    with pytest.raises(ValueError, match=says):
        weights.write(path, {"a": torch.ones(3), "b": torch.ones(2)}, tensors)


# Written row by row


def table(count=7, seed=0):
    """Tensors of ``count`` rows: of several dtypes, one of single numbers, one of no numbers at all."""
    draw = torch.Generator().manual_seed(seed)
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    found = {f"z.{kind}": torch.randn(count, 3, 5, generator=draw).to(kind) for kind in kinds}
    found["y.uint8"] = torch.randint(256, (count, 3), generator=draw).to(torch.uint8)
    found["x.int64"] = torch.randint(999, (count,), generator=draw)
    return found | {"w.none": torch.empty(count, 0, 4)}


def add(path, tensors, sizes, metadata=None):
    rows = weights.Rows(path, {n: t.to("meta") for n, t in tensors.items()}, metadata or {})
    start = 0
    for size in sizes:
        rows.add({name: tensor[start : start + size] for name, tensor in tensors.items()})
        start += size
    rows.close()


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 3, 1), (0, 5, 0, 2)])
def test_rows_that_come_in_pieces_are_the_whole_tensors(path, sizes):
    add(path, table(), sizes, {"origin": "here"})
    assert same(load_file(path), table())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"origin": "here"}
    assert weights.read(path).keys() == table().keys()


def test_pieces_make_no_difference_to_the_bytes(path, tmp_path):
    add(path, table(), (3, 4))
    add(tmp_path / "other.safetensors", table(), (1, 2, 2, 2))
    assert path.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


def test_no_rows_at_all(path):
    add(path, table(0), ())
    assert same(load_file(path), table(0))


def test_rows_take_the_dtype_of_their_tensor_from_any_memory_layout(path):
    given = torch.randn(4, 6, 5)
    rows = weights.Rows(path, {"a": torch.empty(4, 5, 6, dtype=torch.bfloat16)}, {})
    rows.add({"a": given.transpose(1, 2).requires_grad_(), "not asked for": torch.ones(4)})
    rows.close()
    assert same(load_file(path), {"a": given.transpose(1, 2).bfloat16()})


@pytest.mark.parametrize("sizes", [(), (6,), (3, 3), (7, 1), (7, 7)])
def test_too_few_or_too_many_rows_are_an_error(path, sizes):
    longer = {name: torch.cat([tensor, tensor]) for name, tensor in table().items()}
    rows = weights.Rows(path, table(), {})
    start = 0
    for size in sizes:
        rows.add({name: tensor[start : start + size] for name, tensor in longer.items()})
        start += size
    with pytest.raises(ValueError, match=r"model\.safetensors: .* came where .* belong"):
        rows.close()


def test_rows_of_one_tensor_too_many_and_of_another_too_few_are_an_error(path):
    rows = weights.Rows(path, {"a": torch.empty(2, 3), "b": torch.empty(2, 3)}, {})
    rows.add({"a": torch.ones(3, 3), "b": torch.ones(1, 3)})
    with pytest.raises(ValueError, match="came where"):
        rows.close()


def test_rows_of_a_tensor_that_does_not_come_are_an_error(path):
    rows = weights.Rows(path, {"a": torch.empty(2), "b": torch.empty(2)}, {})
    with pytest.raises(KeyError):
        rows.add({"a": torch.ones(2)})


@pytest.mark.parametrize("writer", ["safetensors", "rows", "whole"])
def test_spans_say_where_every_row_lies(path, writer):
    tensors = {name: tensor for name, tensor in table().items() if tensor.numel()}
    if writer == "safetensors":
        save_file(tensors, path, {"format": "pt", "origin": "here"})
    elif writer == "rows":
        add(path, tensors, (2, 5))
    else:
        weights.write(path, tensors, tensors.items())
    content, found = path.read_bytes(), weights.spans(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        span = found[name]
        assert span.dtype == tensor.dtype and span.row == list(tensor.shape[1:])
        for index, row in enumerate(tensor):
            start = span.offset + index * span.row_bytes
            assert content[start : start + span.row_bytes] == raw(row)


def test_spans_of_no_rows(path):
    add(path, table(0), ())
    assert {name: span.row for name, span in weights.spans(path).items()} == {
        name: list(tensor.shape[1:]) for name, tensor in table(0).items()
    }


def test_origin_is_what_the_metadata_says(path):
    add(path, table(), (7,), {"origin": json.dumps({"a": [1, None]})})
    assert weights.origin(path) == {"a": [1, None]}
    for metadata in ({}, {"other": "{}"}, {"origin": "no json"}):
        add(path, table(), (7,), metadata)
        assert weights.origin(path) is None
    path.write_bytes(path.read_bytes()[:50])
    assert weights.origin(path) is None
    assert weights.origin(path.parent / "nowhere") is None


# Read


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_are_those_of_safetensors(tmp_path, path, suffix, zipped):
    # The old format knew no float8.
    kept = {name: tensor for name, tensor in some().items() if zipped or "float8" not in name}
    weights.write(path, kept, kept.items())
    pickled = tmp_path / f"a.{suffix}"
    torch.save(kept, pickled, _use_new_zipfile_serialization=zipped)
    assert same(weights.read(pickled), weights.read(path))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_tensors_are_mapped_not_read(tmp_path, name):
    one = {"a": torch.zeros(2**24)}
    (save_file if name.endswith("s") else torch.save)(one, tmp_path / name)
    before = own_memory()
    found = weights.read(tmp_path / name)
    assert found["a"].sum() == 0
    assert own_memory() - before < 2**24  # a quarter of the tensor's bytes


def own_memory():
    """Bytes of this process that are no mapped file's."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_what_training_scripts_wrap_around_is_taken_off(tmp_path, wrapper):
    inner = {f"module.{name}": tensor for name, tensor in some().items()}
    beside = {"epoch": 3, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)}
    beside["model"] = {"other": torch.ones(1)}  # EMA and state_dict come first
    torch.save(beside | {wrapper: inner}, tmp_path / "a.pth")
    assert same(weights.read(tmp_path / "a.pth"), some())


def shards(folder):
    folder.mkdir()
    names = {"one.safetensors": list(some())[::2], "two.safetensors": list(some())[1::2]}
    for file, mine in names.items():
        save_file({name: some()[name].contiguous() for name in mine}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, mine in names.items() for n in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_checkpoint(tmp_path):
    assert same(weights.read(shards(tmp_path / "a")), some())


def test_index_that_names_a_missing_shard(tmp_path):
    folder = shards(tmp_path / "a")
    (folder / "two.safetensors").unlink()
    assert refused(folder) == (
        f"{folder / 'two.safetensors'} is missing, which model.safetensors.index.json names:"
        " copy all 2 shards there."
    )


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_index_that_is_none(tmp_path, content):
    folder = shards(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is no index of shards" in refused(folder)


def test_folder_may_hold_one_file_of_either_kind(tmp_path):
    for name, save in {"model.safetensors": save_file, "pytorch_model.bin": torch.save}.items():
        folder = tmp_path / name
        folder.mkdir()
        save({"a": torch.ones(2)}, folder / name)
        assert same(weights.read(folder), {"a": torch.ones(2)})


def test_what_is_no_checkpoint(tmp_path):
    assert refused(tmp_path / "a.pth") == f"{tmp_path / 'a.pth'} is missing."
    assert "is missing; weights in a folder are model.safetensors" in refused(tmp_path)
    (tmp_path / "a.npz").touch()
    assert "must be a folder or end in .safetensors, .pth, .pt, .bin." in refused(
        tmp_path / "a.npz"
    )


@pytest.mark.parametrize("kept", [0, 4, 60, 0.5, -1])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth"])
def test_half_a_file(tmp_path, name, kept):
    path = tmp_path / name
    if name == "a.safetensors":
        save_file({"a": torch.ones(1000)}, path)
    else:
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=name == "a.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if 0 < kept < 1 else kept])
    assert "copy or download it again" in refused(path)


@pytest.mark.parametrize("held", [[torch.ones(1)], torch.ones(1), {1: torch.ones(1)}])
def test_pickle_without_a_state_dict(tmp_path, held):
    torch.save(held, tmp_path / "a.pth")
    assert "holds no state dict" in refused(tmp_path / "a.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    path, proof = tmp_path / "a.pth", tmp_path / "proof"
    content = {"weight": torch.ones(2), "more": Evil(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "is refused, for reading it would run code (posix.system)" in refused(path)
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert "is refused" in refused(path)
    assert not proof.exists()


def test_whole_modules_are_code(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    assert "would run code (torch.nn.modules.linear.Linear)" in refused(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_code(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a.pt")
    assert "would run code (TorchScript)" in refused(tmp_path / "a.pt")
