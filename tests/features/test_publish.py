"""The features room lists its files with their hashes, and none that was made of something else."""

import importlib.metadata
import shutil

import pytest
import tiny
from dgmr import artefact, targets
from dgmr.errors import DgmrError
from dgmr.features.publish import publish
from dgmr.files import read_json, sha256
from dgmr.shards import ShardedImages
from dgmr.views import ViewTransform
from dgmr.weights import Rows, layout, origin


def listed(folder, teacher, features, config=None):
    work = features.parent / "work"
    config = config or tiny.features_config()
    publish(teacher, [work / "targets"], work / "calibration", config, folder)
    return read_json(folder / "manifest.json")


def refused(folder, teacher, features, config=None):
    with pytest.raises(DgmrError) as error:
        listed(folder, teacher, features, config)
    assert not folder.exists() and "\n" not in str(error.value)
    assert "is damaged, or was made by another teacher or of other views" in str(error.value)
    assert "delete its folder and run snakemake again." in str(error.value)
    return str(error.value)


def test_manifest_lists_every_file_and_what_was_asked(features, teacher, data):
    work, config = features.parent / "work", tiny.features_config()
    found = read_json(features / "manifest.json")
    assert set(found) == {"about", "config", "targets", "calibration"}
    transform = ViewTransform.for_model(artefact.load(teacher), config.views).about()
    teacher_sha256 = artefact.provenance(teacher)["sha256"]
    assert found["about"] == targets.about(teacher_sha256, transform, config)
    assert found["config"] == config.model_dump(mode="json")
    shards = {shard.name: shard.sha256 for shard in ShardedImages(data).shards}
    assert found["targets"] == {
        path.name: {
            "path": str(path),
            "sha256": sha256(path),
            "shard_sha256": shards[path.name.partition(".")[0]],
        }
        for path in (work / "targets").iterdir()
    }
    assert found["calibration"] == {
        path.name: {"path": str(path), "sha256": sha256(path)}
        for path in (work / "calibration").iterdir()
    }
    assert len(found["targets"]) == 4 and len(found["calibration"]) == 2


def test_metrics_count_files_and_bytes(features):
    work = features.parent / "work"
    sizes = {
        kind: [path.stat().st_size for path in (work / kind).iterdir()]
        for kind in ("targets", "calibration")
    }
    assert read_json(features / "metrics.json") == {
        "target_files": 4,
        "target_bytes": sum(sizes["targets"]),
        "calibration_files": 2,
        "calibration_bytes": sum(sizes["calibration"]),
    }


def test_files_of_several_jobs_are_listed_together(tmp_path, features, teacher):
    work = features.parent / "work"
    folders = [tmp_path / "00000", tmp_path / "00001"]
    for folder, shard in zip(folders, ("00000", "00002"), strict=True):
        folder.mkdir()
        (folder / ".snakemake_timestamp").touch()
        for path in (work / "targets").glob(f"{shard}.*"):
            shutil.copy(path, folder)
    publish(teacher, folders, work / "calibration", tiny.features_config(), tmp_path / "room")
    found = read_json(tmp_path / "room" / "manifest.json")["targets"]
    whole = read_json(features / "manifest.json")["targets"]
    assert {name: entry["sha256"] for name, entry in found.items()} == {
        name: entry["sha256"] for name, entry in whole.items()
    }
    assert str(tmp_path) in found["00002.view1.safetensors"]["path"]


def test_without_a_cache_only_calibration_is_listed(tmp_path, features, teacher):
    config = tiny.features_config(cache="none")
    publish(teacher, [], features.parent / "work" / "calibration", config, tmp_path / "room")
    manifest = targets.Manifest(tmp_path / "room")
    assert manifest.config.cache == "none" and manifest.target_hashes == {}
    manifest.verify_targets()
    assert manifest.calibration("blocks.0.mlp").is_file()


def test_published_files_are_found_until_they_are_damaged(tmp_path, teacher, data):
    room = tiny.write_features(tmp_path, teacher, data, tiny.features_config())
    manifest = targets.Manifest(room)
    manifest.check_teacher(artefact.provenance(teacher)["sha256"])
    manifest.verify_targets()
    found = manifest.targets(ShardedImages(data).shards)
    assert set(found) == {("00000", 0), ("00000", 1), ("00002", 0), ("00002", 1)}
    tiny.damage(found["00002", 1])
    with pytest.raises(DgmrError, match=r"00002\.view1\.safetensors is missing or is not the file"):
        manifest.verify_targets()


def test_what_is_published_is_what_other_stages_ask_for(features, teacher):
    """After a round trip through JSON, too."""
    manifest = targets.Manifest(features)
    views = ViewTransform.for_model(artefact.load(teacher), tiny.features_config().views)
    manifest.check_transform(views.about())
    other = ViewTransform.for_model(artefact.load(teacher), tiny.features_config(views={}).views)
    with pytest.raises(DgmrError, match="about other views: views was"):
        manifest.check_transform(other.about())


def test_another_teachers_files_are_not_published(tmp_path, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    assert "00000.view0.safetensors is" in refused(tmp_path / "room", other, features)


def test_another_teachers_calibration_is_not_published(tmp_path, features, data):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    room = tiny.write_features(tmp_path, other, data, tiny.features_config())
    with pytest.raises(DgmrError, match=r"blocks\.0\.mlp\.safetensors is damaged, or was made by"):
        publish(
            other,
            [room.parent / "work" / "targets"],
            features.parent / "work" / "calibration",
            tiny.features_config(),
            tmp_path / "new",
        )


@pytest.mark.parametrize(
    "change",
    [
        {"views": {"count": 2, "seed": 4, "crop_scale": (0.5, 1.0)}},
        {"views": {"count": 2, "seed": 3, "crop_scale": (0.5, 1.0), "grayscale": 0.1}},
        {"dtype": "bfloat16"},
        {"precision": "bfloat16"},
        {"patch_tokens": 2},
        {"patch_tokens": None},
        {"blocks": (1,)},
        {"pixels": False},
    ],
    ids=str,
)
def test_what_was_asked_otherwise_is_not_published(tmp_path, features, teacher, change):
    refused(tmp_path / "room", teacher, features, tiny.features_config(**change))


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"calibration": {"samples": 9}}, {"cache": "none"}], ids=str
)
def test_how_it_was_asked_does_not_matter(tmp_path, features, teacher, change):
    config = tiny.features_config(**change)
    assert len(listed(tmp_path / "room", teacher, features, config)["targets"]) == 4


@pytest.mark.parametrize(
    "change", [{"mean": (0.4, 0.5, 0.5)}, {"interpolation": "bilinear"}], ids=str
)
def test_what_the_teacher_takes_is_part_of_it(tmp_path, features, change):
    """The same weights, another config.json."""
    model = tiny.vit()
    model.pretrained_cfg = model.pretrained_cfg | change
    other = tiny.write_teacher(tmp_path / "other", model)
    assert artefact.provenance(other) == artefact.provenance(
        tiny.write_teacher(tmp_path / "same", tiny.vit())
    )
    refused(tmp_path / "room", other, features)


@pytest.mark.parametrize("library", ["pillow", "torchvision"])
def test_files_of_another_version_are_not_published(
    tmp_path, features, teacher, library, monkeypatch
):
    true = importlib.metadata.version
    listed(tmp_path / "this", teacher, features)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.0" if name == library else true(name)
    )
    refused(tmp_path / "room", teacher, features)


@pytest.mark.parametrize("spoil", ["nothing", "words"])
def test_a_file_that_does_not_say_is_not_published(tmp_path, features, teacher, spoil):
    work = features.parent / "work"
    copy = tmp_path / "targets"
    shutil.copytree(work / "targets", copy)
    path = copy / "00002.view0.safetensors"
    assert origin(path)["shard_sha256"]
    if spoil == "nothing":
        path.write_bytes(b"")
    else:
        file = Rows(path, {name: t[:0] for name, t in layout(path).items()}, {"origin": "words"})
        file.close()
    with pytest.raises(DgmrError, match=r"00002\.view0\.safetensors is damaged, or"):
        publish(teacher, [copy], work / "calibration", tiny.features_config(), tmp_path / "room")


def test_targets_know_the_shard_they_were_made_of(tmp_path, features):
    other = ShardedImages(tiny.write_data(tmp_path / "data", first=100))
    with pytest.raises(DgmrError, match="another shard 00000 than the data room holds"):
        targets.Manifest(features).targets(other.shards)
