"""Labelled images: all of them, in the classes' order, or a sentence."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from dgmr import fashion_mnist
from dgmr.data.evaluation import count_classes, make
from dgmr.errors import DgmrError
from dgmr.params import EvaluationData
from dgmr.shards import ShardedImages, decode
from pictures import encoded, picture


def made(folder, shard_size=1000, **config):
    output = folder / "made"
    make(EvaluationData(**config), shard_size, output, folder / "downloads")
    return ShardedImages(output, verify=True)


def refused(folder, **config):
    """The sentence; nothing must be left behind."""
    with pytest.raises(DgmrError) as error:
        made(folder, **config)
    assert not (folder / "made").exists() and not list(folder.glob("*.partial"))
    return str(error.value)


def names(folder):
    return [
        name
        for path in sorted((folder / "made").glob("*.parquet"))
        for name in pq.read_table(path)["name"].to_pylist()
    ]


# Fashion-MNIST


def test_fashion_mnist_whole(small_fashion_mnist, tmp_path):
    images, labels = fashion_mnist.load("test", tmp_path)
    found = made(tmp_path, shard_size=15)
    assert [shard.samples for shard in found.shards] == [15, 15, 10]
    assert found.labels == labels.tolist()
    assert found.keys == [f"{index:09d}" for index in range(40)]
    for index in (0, 14, 15, 39):
        assert np.array_equal(np.asarray(found.image(index))[..., 0], images[index])


@pytest.mark.parametrize("n_samples", [10, 13, 20, 39, 40])
def test_fewer_samples_are_spread_over_all_classes(small_fashion_mnist, tmp_path, n_samples):
    found = made(tmp_path, n_samples=n_samples)  # the labels are sorted: 4 of each class
    counts = Counter(found.labels)
    assert len(found) == n_samples == len(set(names(tmp_path)))
    assert set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_more_samples_than_there_are(small_fashion_mnist, tmp_path):
    sentence = refused(tmp_path, n_samples=41)
    assert sentence == "data.eval.n_samples is 41, but there are only 40 images."


def test_equal_images_give_equal_bytes(small_fashion_mnist, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        made(tmp_path / name, n_samples=10)
    tars = [(tmp_path / name / "made" / "00000.tar").read_bytes() for name in "ab"]
    assert tars[0] == tars[1]


# A folder of images


@pytest.fixture
def classes(photos, tmp_path):
    """A folder a wnid, with one real photo each, named by a link."""
    folder = tmp_path / "photos"
    paths = sorted(photos.glob("*.JPEG"))[:24]
    for path in reversed(paths):
        wnid, _, name = path.name.partition("_")
        (folder / wnid).mkdir(parents=True)
        (folder / wnid / name).symlink_to(path)
    return folder


def test_image_folder_of_photos(classes, tmp_path):
    found = made(tmp_path, shard_size=10, source="imagefolder", path=str(classes))
    assert found.labels == list(range(24))  # in the order of the sorted wnids
    wnids = sorted(path.name for path in classes.iterdir())
    for index, name in enumerate(names(tmp_path)):
        assert f"/{wnids[index]}/" in name
    for index in (0, 11, 23):
        (photo,) = (classes / wnids[index]).iterdir()
        assert np.array_equal(found.image(index), decode(photo.read_bytes()))
    assert count_classes(EvaluationData(source="imagefolder", path=str(classes))) == 24


def test_spread_over_photos(classes, tmp_path):
    found = made(tmp_path, source="imagefolder", path=str(classes), n_samples=8)
    assert found.labels == list(range(0, 24, 3))


def test_broken_photo_stops_the_room_by_name(classes, tmp_path):
    (photo,) = sorted(classes.iterdir())[7].iterdir()
    content = photo.read_bytes()
    photo.unlink()
    photo.write_bytes(content[: len(content) // 2])
    sentence = refused(tmp_path, source="imagefolder", path=str(classes))
    assert f"data.eval: {photo} is a broken image (" in sentence
    assert "models must be judged on all images" in sentence


def small_folder(folder, **classes):
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").write_bytes(encoded(picture(index)))
    return {"source": "imagefolder", "path": str(folder)}


def test_other_formats_are_stored_as_png(tmp_path):
    config = small_folder(tmp_path / "photos", cat=1)
    (tmp_path / "photos" / "cat" / "a.bmp").write_bytes(encoded(format="BMP"))
    found = made(tmp_path, **config)
    assert found.labels == [0, 0] and np.array_equal(found.image(1), picture())


def test_no_such_folder(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").touch()
        config = {"source": "imagefolder", "path": str(path)}
        sentence = refused(tmp_path, **config)
        assert f"data.eval.path: {path} is no folder with one sub-folder" in sentence
        with pytest.raises(DgmrError, match="is no folder with one sub-folder"):
            count_classes(EvaluationData(**config))


def test_folder_without_classes_or_with_an_empty_one(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is no folder with" in refused(
        tmp_path, source="imagefolder", path=str(tmp_path / "empty")
    )
    config = small_folder(tmp_path / "photos", cat=2, dog=0)
    assert "dog" in refused(tmp_path, **config)


# Tars


def write_tars(folder, samples, per_tar=4):
    folder.mkdir(exist_ok=True)
    for start in range(0, len(samples), per_tar):
        with webdataset.TarWriter(str(folder / f"{start // per_tar}.tar"), mtime=0) as tar:
            for number, members in enumerate(samples[start : start + per_tar], start):
                tar.write({"__key__": f"val/{number:03d}"} | members)
    return {"source": "webdataset", "path": f"{folder}/*.tar"}


def labelled(count):
    kinds = [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
    return [
        {
            kinds[index % 4][0]: encoded(picture(index), kinds[index % 4][1]),
            "cls": f"{index // 2}\n".encode(),
            "json": b"{}",
        }
        for index in range(count)
    ]


def test_tars_whole(tmp_path):
    samples = labelled(10)
    found = made(tmp_path, shard_size=7, **write_tars(tmp_path / "tars", samples))
    assert found.labels == [index // 2 for index in range(10)]
    assert [shard.samples for shard in found.shards] == [7, 3]
    for index, sample in enumerate(samples):
        content = next(sample[name] for name in ("png", "jpg", "jpeg", "webp") if name in sample)
        assert np.array_equal(found.image(index), decode(content))
    assert names(tmp_path)[5] == f"{tmp_path}/tars/1.tar: val/005"


def test_some_of_the_tars_images(tmp_path):
    config = write_tars(tmp_path / "tars", labelled(10))
    found = made(tmp_path, n_samples=5, **config)
    assert [name[-3:] for name in names(tmp_path)] == ["000", "002", "004", "006", "008"]
    assert found.labels == [0, 1, 2, 3, 4]
    (tmp_path / "again").mkdir()
    assert "there are only 10 images" in refused(tmp_path / "again", n_samples=11, **config)


@pytest.mark.parametrize(
    "sample",
    [
        {"png": encoded()},
        {"png": encoded(), "cls": b"cat"},
        {"png": encoded(), "cls": b""},
        {"png": encoded(), "cls": b"-1"},
        {"cls": b"1", "txt": b"no image"},
    ],
)
def test_sample_without_image_or_class_is_refused(tmp_path, sample):
    config = write_tars(tmp_path / "tars", [*labelled(5), sample])
    sentence = refused(tmp_path, **config)
    assert f"data.eval.path: {tmp_path}/tars/1.tar: val/005 lacks an image" in sentence


def test_broken_image_in_a_tar_stops_the_room_by_name(tmp_path):
    config = write_tars(tmp_path / "tars", [*labelled(5), {"jpg": encoded()[:50], "cls": b"0"}])
    sentence = refused(tmp_path, **config)
    assert f"data.eval: {tmp_path}/tars/1.tar: val/005 is a broken image" in sentence


def test_cut_off_tar_stops_the_room_by_name(tmp_path):
    config = write_tars(tmp_path / "tars", labelled(8))
    content = (tmp_path / "tars" / "1.tar").read_bytes()
    (tmp_path / "tars" / "1.tar").write_bytes(content[:700])
    for n_samples in (None, 2):
        sentence = refused(tmp_path, n_samples=n_samples, **config)
        assert f"data.eval.path: {tmp_path}/tars/1.tar is no whole tar" in sentence


def test_no_tars(tmp_path):
    config = {"source": "webdataset", "path": f"{tmp_path}/*.tar"}
    assert refused(tmp_path, **config) == f"data.eval.path: no file matches {tmp_path}/*.tar."
    with pytest.raises(DgmrError, match="data.eval.path: no file matches"):
        count_classes(EvaluationData(**config))


def test_classes_are_counted_of_folders_only(tmp_path):
    assert count_classes(EvaluationData()) is None
    config = write_tars(tmp_path / "tars", labelled(2))
    assert count_classes(EvaluationData(**config)) is None
    folder = small_folder(tmp_path / "photos", cat=1, dog=2, eel=1)
    assert count_classes(EvaluationData(**folder)) == 3
