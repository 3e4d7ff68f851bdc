"""Shared fixtures: real photos, a small Fashion-MNIST."""

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from dgmr import fashion_mnist

REPOSITORY = Path(__file__).parents[1]
PHOTOS = Path(
    os.environ.get("DGMR_TEST_PHOTOS", REPOSITORY.parent / "shared" / "data" / "imagenet-photos")
)


@pytest.fixture(scope="session")
def some_photos():
    """A few real photos, or none where there are none."""
    return sorted(PHOTOS.glob("*.JPEG"))[::40]


@pytest.fixture(scope="session")
def photos():
    """The folder of real ImageNet photos, ``<wnid>_<class>.JPEG``, of many sizes and some gray."""
    if not any(PHOTOS.glob("*.JPEG")):
        pytest.skip(f"no photos (*.JPEG) in {PHOTOS}; DGMR_TEST_PHOTOS names another folder")
    return PHOTOS


def idx(values):
    """Bytes of the idx format: type and rank, big-endian shape, data."""
    shape = np.array(values.shape, ">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + shape + values.astype(np.uint8).tobytes()


@pytest.fixture
def small_fashion_mnist(tmp_path, monkeypatch):
    """A stand-in for Debian's folder: 30 train and 40 test images, the labels sorted by class."""
    folder = tmp_path / "debian"
    folder.mkdir()
    random = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 40)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.sort(np.arange(count) % 10)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    sums = {
        path.name: hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        for path in folder.iterdir()
    }
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", folder)
    monkeypatch.setattr(fashion_mnist, "_SHA256", sums)
    return folder
