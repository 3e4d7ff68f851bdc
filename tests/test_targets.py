"""Cached answers: only the files that the manifest lists are read, row by row."""

import dataclasses
import json
import os
import pickle

import pytest
import tiny
import torch
from dgmr import targets, weights
from dgmr.errors import DgmrError
from dgmr.files import sha256
from dgmr.params import Features
from dgmr.shards import Shard
from dgmr.targets import Row, Targets
from safetensors.torch import load_file, save_file

COUNTS = {"00000": 4, "00001": 1, "00003": 7}  # samples of the shards that have any
SHARDS = [Shard(name, count, 100, f"hash-{name}") for name, count in COUNTS.items()]
EMPTY = Shard("00002", 0, 100, "hash-00002")
CONFIG = Features.model_validate({"views": {"count": 2}, "blocks": (0,)})
TRANSFORM = {"views": CONFIG.views.model_dump(mode="json"), "size": [8, 8], "pillow": "1"}


def some(count, seed):
    """Answers about ``count`` samples, and their pixels: of three dtypes."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "pooled": torch.randn(count, 3, generator=draw),
        "patch_tokens": torch.randn(count, 5, 3, generator=draw).bfloat16(),
        "blocks.0": torch.randn(count, 6, 2, generator=draw).bfloat16(),
        "pixels": torch.randint(256, (count, 3, 8, 8), generator=draw).to(torch.uint8),
    }


@pytest.fixture
def files(tmp_path):
    """By shard and view; safetensors' own writer puts the names in another order."""
    found = {}
    for seed, (shard, view) in enumerate((s, v) for s in COUNTS for v in (0, 1)):
        found[shard, view] = tmp_path / targets.file_name(shard, view)
        save_file(some(COUNTS[shard], seed), found[shard, view])
    return found


@pytest.fixture
def room(tmp_path, files):
    """A features room: the targets, and one file of calibration inputs."""
    listed = {
        path.name: {"path": str(path), "sha256": sha256(path), "shard_sha256": f"hash-{shard}"}
        for (shard, _), path in files.items()
    }
    calibration = tmp_path / "blocks.0.mlp.safetensors"
    save_file({"inputs": torch.randn(2, 3)}, calibration)
    content = {
        "about": targets.about("t1", TRANSFORM, CONFIG),
        "config": CONFIG.model_dump(mode="json"),
        "targets": listed,
        "calibration": {
            calibration.name: {"path": str(calibration), "sha256": sha256(calibration)}
        },
    }
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    return tmp_path


# The manifest


def test_manifest_gives_the_files_of_all_views(room, files):
    manifest = targets.Manifest(room)
    assert manifest.targets([*SHARDS, EMPTY]) == files
    assert manifest.targets([SHARDS[1], EMPTY]) == {
        ("00001", view): files["00001", view] for view in (0, 1)
    }
    assert manifest.calibration("blocks.0.mlp") == room / "blocks.0.mlp.safetensors"
    assert manifest.config == CONFIG and manifest.teacher_sha256 == "t1"
    assert manifest.target_hashes == {path.name: sha256(path) for path in files.values()}
    manifest.verify_targets()


def test_missing_manifest_says_what_to_run(tmp_path):
    with pytest.raises(DgmrError, match="run the features stage first"):
        targets.Manifest(tmp_path)


def test_unlisted_files_are_refused(room):
    manifest = targets.Manifest(room)
    with pytest.raises(DgmrError, match=r"00009\.view0\.safetensors is not among the targets"):
        manifest.targets([Shard("00009", 1, 100, "hash-00009")])
    with pytest.raises(DgmrError, match=r"blocks\.1\.mlp\.safetensors is not among the calib"):
        manifest.calibration("blocks.1.mlp")


@pytest.mark.parametrize("name", [f"{s}.view{v}.safetensors" for s in COUNTS for v in (0, 1)])
@pytest.mark.parametrize("at", [0, 0.5, -1])
def test_one_changed_byte_of_any_file_is_found(room, name, at):
    content = bytearray((room / name).read_bytes())
    content[int(at * len(content)) if at > 0 else at] ^= 1
    (room / name).write_bytes(content)
    manifest = targets.Manifest(room)
    with pytest.raises(DgmrError) as error:
        manifest.verify_targets()
    assert str(error.value) == (
        f"{room / name} is missing or is not the file that results/features/manifest.json lists:"
        " delete it and its folder, and run snakemake again."
    )


def test_missing_files_are_told(room):
    manifest = targets.Manifest(room)
    (room / "00003.view1.safetensors").unlink()
    for ask in (manifest.verify_targets, lambda: manifest.targets(SHARDS)):
        with pytest.raises(DgmrError, match=r"00003\.view1\.safetensors is missing or is not the"):
            ask()
    assert len(manifest.targets(SHARDS[:2])) == 4


@pytest.mark.parametrize("spoil", [tiny.damage, lambda path: path.unlink()])
def test_damaged_and_missing_calibration_is_refused(room, spoil):
    spoil(room / "blocks.0.mlp.safetensors")
    with pytest.raises(DgmrError, match=r"blocks\.0\.mlp\.safetensors is missing or is not"):
        targets.Manifest(room).calibration("blocks.0.mlp")


def test_targets_of_other_images_are_refused(room):
    other = dataclasses.replace(SHARDS[2], sha256="another")
    with pytest.raises(DgmrError, match="another shard 00003 than the data room holds"):
        targets.Manifest(room).targets([*SHARDS[:2], other])


def test_features_of_another_teacher_are_refused(room):
    targets.Manifest(room).check_teacher("t1")
    with pytest.raises(DgmrError, match="made by another teacher") as error:
        targets.Manifest(room).check_teacher("t2")
    assert "\n" not in str(error.value)


def test_features_of_the_same_views_are_taken(room):
    targets.Manifest(room).check_transform(TRANSFORM)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": [8, 9]}, "size was [8, 8], and is [8, 9] now"),
        ({"pillow": "2"}, "pillow was 1, and is 2 now"),
        ({"views": TRANSFORM["views"] | {"seed": 7}}, "'seed': 7"),
        ({"interpolation": "bicubic"}, "interpolation was None, and is bicubic now"),
    ],
)
def test_features_of_other_views_are_refused_by_what_differs(room, change, says):
    with pytest.raises(DgmrError) as error:
        targets.Manifest(room).check_transform(TRANSFORM | change)
    (name,) = change
    assert f"results/features is about other views: {name} was " in str(error.value)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"patch_tokens": 2},
        {"patch_tokens": None},
        {"blocks": (0, 1)},
        {"dtype": "float32"},
        {"pixels": False},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_about_changes_with_all_that_shapes_the_targets(change):
    before = targets.about("t1", TRANSFORM, CONFIG)
    assert json.loads(json.dumps(before)) == before
    assert targets.about("t1", TRANSFORM, CONFIG.model_copy(update=change)) != before
    assert targets.about("t2", TRANSFORM, CONFIG) != before
    assert targets.about("t1", TRANSFORM | {"pillow": "2"}, CONFIG) != before


def test_about_does_not_change_with_how_the_teacher_is_asked():
    other = CONFIG.model_copy(update={"batch_size": 1, "cache": "none", "calibration": None})
    assert targets.about("t1", TRANSFORM, other) == targets.about("t1", TRANSFORM, CONFIG)


# Rows


ALL = [Row(shard, row, view) for shard in COUNTS for row in range(COUNTS[shard]) for view in (0, 1)]


@pytest.mark.parametrize(
    "rows",
    [
        ALL,
        ALL[::-1],
        ALL[1::3] + ALL[::5],
        [ALL[3]],
        [ALL[3], ALL[3], ALL[-1], ALL[3]],
    ],
    ids=["all", "backwards", "mixed", "one", "repeated"],
)
def test_rows_are_those_that_safetensors_reads(files, rows):
    whole = {place: load_file(path) for place, path in files.items()}
    found = Targets(files).read(rows)
    assert set(found) == {"pooled", "patch_tokens", "blocks.0", "pixels"}
    for name, tensor in found.items():
        wanted = torch.stack([whole[shard, view][name][row] for shard, row, view in rows])
        assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted)


def test_one_file_may_name_its_tensors_in_another_order(files):
    whole = {name: tensor.clone() for name, tensor in load_file(files["00003", 1]).items()}
    for order in (sorted(whole), sorted(whole, reverse=True)):
        content = {name: whole[name] for name in order}
        weights.write(files["00003", 1], content, content.items())
        rows = [Row("00000", 2, 0), Row("00003", 6, 1), Row("00003", 0, 1)]
        found, first = Targets(files).read(rows), load_file(files["00000", 0])
        for name, tensor in found.items():
            wanted = torch.stack([first[name][2], whole[name][6], whole[name][0]])
            assert torch.equal(tensor, wanted)


def test_names_are_those_in_the_files(files):
    assert sorted(Targets(files).read([Row("00000", 0, 0)])) == [
        "blocks.0",
        "patch_tokens",
        "pixels",
        "pooled",
    ]


def test_what_was_read_may_be_changed(files):
    opened = Targets(files)
    first = opened.read([ALL[0]])["pooled"].fill_(0)
    assert not torch.equal(opened.read([ALL[0]])["pooled"], first)


def test_a_file_that_is_not_there_is_not_read(files):
    with pytest.raises(KeyError):
        Targets(files).read([Row("00000", 0, 2)])


@pytest.mark.parametrize("opened_before", [True, False])
def test_a_file_cut_off_is_told(files, opened_before):
    opened, path = Targets(files), files["00003", 1]
    if opened_before:
        opened.read([Row("00003", 0, 1)])
    path.write_bytes(path.read_bytes()[:-1])
    opened.read([Row("00003", 6, 0)])
    with pytest.raises(DgmrError, match=r"00003\.view1\.safetensors is missing or is not the file"):
        opened.read([Row("00000", 0, 0), Row("00003", 6, 1)])


def test_no_file_stays_open(files):
    opened = Targets(files)
    before = os.listdir("/proc/self/fd")
    opened.read(ALL)
    assert os.listdir("/proc/self/fd") == before


def test_read_again_in_a_process_that_got_a_copy(files):
    opened = Targets(files)
    wanted = opened.read(ALL[:3])
    copy = pickle.loads(pickle.dumps(opened))  # noqa: S301 - our own bytes
    for name, tensor in copy.read(ALL[:3]).items():
        assert torch.equal(tensor, wanted[name])


def test_a_row_that_a_file_has_not_is_no_other_tensor_s(files):
    opened = Targets(files)
    for row in (-1, COUNTS["00000"], 10_000):
        with pytest.raises(IndexError, match="has no row"):
            opened.read([Row("00000", 0, 1), Row("00000", row, 1)])


@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_file_cut_in_its_header_or_gone_is_told(files, left):
    path = files["00000", 1]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DgmrError, match="is missing or is not the file"):
        Targets(files).read([Row("00000", 0, 1)])
    path.unlink()
    with pytest.raises(DgmrError, match="is missing or is not the file"):
        Targets(files).read([Row("00000", 0, 1)])
