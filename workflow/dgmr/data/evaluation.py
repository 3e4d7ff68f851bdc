"""Labelled images become evaluation shards: Fashion-MNIST's test set, an ImageFolder, or tars.

A model is judged on all images or on none: a broken one stops the room, by name.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

from dgmr import fashion_mnist
from dgmr.data import tables
from dgmr.data.pack import BROKEN, normalised
from dgmr.errors import DgmrError
from dgmr.files import replaced_folder
from dgmr.params import EvaluationData
from dgmr.shards import Sample, Shard, write_manifest, write_shard


class _Labelled(NamedTuple):
    name: str
    encoded: bytes
    label: int


def make(config: EvaluationData, shard_size: int, output: Path, download_folder: Path) -> None:
    """Write the shards and manifest of ``config``'s images to the folder ``output``.

    Raises:
        DgmrError: there are no images, a label is missing, or an image is broken.
    """
    images = _SOURCES[config.source](config, download_folder)
    with replaced_folder(output) as folder:
        shards: list[Shard] = []
        while batch := list(islice(images, shard_size)):
            start = len(shards) * shard_size
            samples = (_sample(start + i, image) for i, image in enumerate(batch))
            shards.append(write_shard(folder, f"{len(shards):05d}", samples))
        if not shards:
            raise DgmrError(f"data.eval.path: {config.path} has no images.")
        write_manifest(folder, shards, source=config.source)


def count_classes(config: EvaluationData) -> int | None:
    """Classes of an ImageFolder, to be compared with the model's before any work; else None.

    Raises:
        DgmrError: ``data.eval.path`` leads nowhere.
    """
    if config.source == "webdataset":
        tables.find(str(config.path), "data.eval.path")
    if config.source != "imagefolder":
        return None
    return len(_open_image_folder(config).classes)


def _sample(index: int, image: _Labelled) -> Sample:
    try:
        encoded, extension = normalised(image.encoded, image_size=None)
    except BROKEN as error:
        raise DgmrError(
            f"data.eval: {image.name} is a broken image ({error}): mend or remove it,"
            " for models must be judged on all images."
        ) from None
    return Sample(f"{index:09d}", encoded, extension, image.label, {"name": image.name})


def _fashion_mnist(config: EvaluationData, download_folder: Path) -> Iterator[_Labelled]:
    images, labels = fashion_mnist.load("test", download_folder)
    for index in _spread(len(images), config.n_samples):
        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, "PNG", compress_level=1)
        yield _Labelled(f"test/{index:05d}", buffer.getvalue(), int(labels[index]))


def _image_folder(config: EvaluationData, _download_folder: Path) -> Iterator[_Labelled]:
    files = _open_image_folder(config).samples
    for index in _spread(len(files), config.n_samples):
        path, label = files[index]
        yield _Labelled(path, Path(path).read_bytes(), label)


def _open_image_folder(config: EvaluationData) -> ImageFolder:
    try:
        return ImageFolder(str(config.path))
    except OSError as error:
        raise DgmrError(
            f"data.eval.path: {config.path} is no folder with one sub-folder of images a class:"
            f" {error}"
        ) from None


def _webdataset(config: EvaluationData, _download_folder: Path) -> Iterator[_Labelled]:
    assert config.path is not None  # params.py sees to it
    tars = [str(path) for path in tables.find(config.path, "data.eval.path")]
    total = None
    if config.n_samples is not None:
        total = sum(1 for _ in _tar_samples(tars))
    wanted = None if total is None else set(_spread(total, config.n_samples))
    for index, sample in enumerate(_tar_samples(tars)):
        if wanted is not None and index not in wanted:
            continue
        name = f"{sample['__url__']}: {sample['__key__']}"
        encoded = next((sample[e] for e in ("jpg", "jpeg", "png", "webp") if e in sample), None)
        if encoded is None or not sample.get("cls", b"").strip().isdigit():
            raise DgmrError(
                f"data.eval.path: {name} lacks an image (.jpg, .png, .webp) or the number of its"
                " class (.cls)."
            )
        yield _Labelled(name, encoded, int(sample["cls"]))


def _tar_samples(tars: list[str]) -> Iterator[dict[str, Any]]:
    try:
        yield from webdataset.WebDataset(tars, shardshuffle=False)
    except tarfile.ReadError as error:
        raise DgmrError(
            f"data.eval.path: {error.args[-1]} is no whole tar ({error.args[0]}):"
            " mend or remove it, for models must be judged on all images."
        ) from None


def _spread(total: int, wanted: int | None) -> Iterable[int]:
    """``wanted`` of ``total`` indices, evenly spaced, so that sorted classes all stay in."""
    if wanted is not None and wanted > total:
        raise DgmrError(f"data.eval.n_samples is {wanted}, but there are only {total} images.")
    return np.linspace(0, total, wanted or total, endpoint=False).astype(int).tolist()


_SOURCES = {
    "fashion-mnist": _fashion_mnist,
    "imagefolder": _image_folder,
    "webdataset": _webdataset,
}
