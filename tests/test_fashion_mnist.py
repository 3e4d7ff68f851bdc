"""Fashion-MNIST is found in one of three places, verified, or refused with a sentence."""

import gzip
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from dgmr import fashion_mnist
from dgmr.errors import DgmrError

IMAGES = "t10k-images-idx3-ubyte.gz"
INSTALLED = fashion_mnist.DEBIAN_FOLDER


@pytest.fixture
def ways(monkeypatch):
    """The two ways of fetching, replaced: what each does to the folder, and which were gone."""

    ways = SimpleNamespace(official=lambda _: None, debian=lambda _: None, gone=[])

    def way(name):
        def obtain(folder):
            ways.gone.append(name)
            getattr(ways, name)(folder)

        return obtain

    monkeypatch.setattr(fashion_mnist, "_from_official_addresses", way("official"))
    monkeypatch.setattr(fashion_mnist, "_from_debian_package", way("debian"))
    return ways


def fail(error):
    def obtain(_folder):
        raise error

    return obtain


@pytest.fixture
def original(small_fashion_mnist, tmp_path, monkeypatch):
    """The four files, which Debian's folder does not have."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "not-installed")
    return small_fashion_mnist


def copy_of(original):
    def obtain(folder):
        shutil.copytree(original, folder, dirs_exist_ok=True)

    return obtain


def test_installed_files_come_first(small_fashion_mnist, tmp_path, ways):
    assert fashion_mnist.locate(tmp_path / "downloads") == small_fashion_mnist
    assert ways.gone == [] and not (tmp_path / "downloads").exists()


def test_files_that_are_there_are_not_fetched_again(original, tmp_path, ways):
    copy_of(original)(tmp_path / "downloads")
    assert fashion_mnist.locate(tmp_path / "downloads") == tmp_path / "downloads"
    assert ways.gone == []


def test_official_addresses_come_before_the_debian_package(original, tmp_path, ways):
    ways.official = copy_of(original)
    assert fashion_mnist.locate(tmp_path / "downloads") == tmp_path / "downloads"
    assert ways.gone == ["official"]


def test_debian_package_comes_last(original, tmp_path, ways):
    ways.official, ways.debian = fail(OSError("no network")), copy_of(original)
    assert fashion_mnist.locate(tmp_path / "downloads") == tmp_path / "downloads"
    assert ways.gone == ["official", "debian"]


def damaged(content, how):
    return {
        "cut off": content[: len(content) // 2],
        "empty": b"",
        "not gzip": b"<html>404</html>",
        "other images": gzip.compress(gzip.decompress(content)[:-1] + b"\x07"),
        "bit flipped": content[:40] + bytes([content[40] ^ 4]) + content[41:],
    }[how]


@pytest.mark.parametrize("how", ["cut off", "empty", "not gzip", "other images", "bit flipped"])
def test_damaged_files_are_fetched_again(original, tmp_path, ways, how):
    copy_of(original)(tmp_path / "downloads")
    file = tmp_path / "downloads" / IMAGES
    file.write_bytes(damaged(file.read_bytes(), how))
    ways.official = copy_of(original)
    fashion_mnist.locate(tmp_path / "downloads")
    assert ways.gone == ["official"]
    assert file.read_bytes() == (original / IMAGES).read_bytes()


@pytest.mark.parametrize("how", ["cut off", "not gzip", "other images"])
def test_damaged_installation_is_passed_over(small_fashion_mnist, tmp_path, ways, how):
    whole = tmp_path / "whole"
    shutil.copytree(small_fashion_mnist, whole)
    file = small_fashion_mnist / IMAGES
    file.write_bytes(damaged(file.read_bytes(), how))
    ways.debian = copy_of(whole)
    assert fashion_mnist.locate(tmp_path / "downloads") == tmp_path / "downloads"


def test_damaged_download_is_refused(original, tmp_path, ways):
    def damage(folder):
        copy_of(original)(folder)
        (folder / IMAGES).write_bytes(damaged((folder / IMAGES).read_bytes(), "other images"))

    ways.official = ways.debian = damage
    with pytest.raises(DgmrError, match="what came is not the four official files"):
        fashion_mnist.locate(tmp_path / "downloads")
    assert ways.gone == ["official", "debian"]


def test_sentence_where_there_is_nothing(original, tmp_path, ways):
    ways.official = fail(RuntimeError("File not found or corrupted."))
    ways.debian = fail(subprocess.CalledProcessError(100, "apt-get"))
    with pytest.raises(DgmrError) as error:
        fashion_mnist.load("train", tmp_path / "downloads")
    sentence = str(error.value)
    assert f"Fashion-MNIST is not in {tmp_path / 'not-installed'}" in sentence
    assert "File not found or corrupted." in sentence and "exit status 100" in sentence
    assert "install the Debian package dataset-fashion-mnist" in sentence
    assert f"into {tmp_path / 'downloads'}." in sentence


def test_no_debian_no_package(original, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(RuntimeError, match="no apt-get here"):
        fashion_mnist._from_debian_package(tmp_path)


@pytest.mark.parametrize(("split", "count"), [("train", 30), ("test", 40)])
def test_load_reads_images_and_labels(small_fashion_mnist, tmp_path, split, count):
    images, labels = fashion_mnist.load(split, tmp_path)
    assert images.shape == (count, 28, 28) and images.dtype == np.uint8
    assert labels.tolist() == sorted(index % 10 for index in range(count))
    prefix = {"train": "train", "test": "t10k"}[split]
    raw = gzip.decompress((small_fashion_mnist / f"{prefix}-images-idx3-ubyte.gz").read_bytes())
    assert images[1, 2, 3] == raw[16 + 28 * 28 + 2 * 28 + 3]


@pytest.mark.skipif(not INSTALLED.is_dir(), reason=f"{INSTALLED} is not there")
def test_real_files_are_the_official_ones(tmp_path):
    images, labels = fashion_mnist.load("test", tmp_path)
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10
    assert images.mean() / 255 == pytest.approx(fashion_mnist.MEAN, abs=0.005)
    assert images.std() / 255 == pytest.approx(fashion_mnist.STD, abs=0.005)
    assert list(tmp_path.iterdir()) == []
