"""Fashion-MNIST as a table takes the same way as a LAION subset."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from dgmr import fashion_mnist
from dgmr.data import fashion_table, tables
from dgmr.data.pack import pack
from dgmr.data.select import select
from dgmr.params import Data, Filters
from dgmr.shards import Shard as Entry
from dgmr.shards import ShardedImages, read_json, write_manifest
from PIL import Image


@pytest.fixture
def table(small_fashion_mnist, tmp_path):
    path = tmp_path / "room" / "table.parquet"
    fashion_table.make(path, tmp_path / "downloads")
    return path


def test_rows_point_to_the_images(table, tmp_path):
    images, labels = fashion_mnist.load("train", tmp_path)
    rows = pq.read_table(table).to_pylist()
    assert len(rows) == len(images) == 30
    for row, image, label in zip(rows, images, labels, strict=True):
        with Image.open(table.parent / row["URL"]) as stored:
            assert np.array_equal(stored, image)
        assert row["TEXT"] == f"a photo of: {fashion_mnist.CLASSES[label]}"
    assert {(row["WIDTH"], row["HEIGHT"], row["punsafe"]) for row in rows} == {(28, 28, 0.0)}
    assert {row["similarity"] for row in rows} == {None}


def test_table_is_the_same_on_every_machine(table, small_fashion_mnist, tmp_path):
    other = tmp_path / "elsewhere" / "table.parquet"
    fashion_table.make(other, tmp_path / "downloads")
    assert other.read_bytes() == table.read_bytes()


def test_default_filters_take_all_of_it(table):
    found = tables.columns(table, Filters())
    assert set(found) == {"url", "caption", "width", "height", "similarity", "punsafe"}


def test_whole_way_into_shards(table, tmp_path):
    config = Data.model_validate({"urls": "file", "n_samples": 12, "shard_size": 12})
    select(str(table), config, tmp_path / "selection")
    rows = tmp_path / "selection" / "00000.parquet"
    options = {"table_folder": table.parent, "downloaded": None, "image_size": None}
    pack(rows, config.shards, tmp_path / "shards", **options)
    entries = [Entry(**entry) for entry in read_json(tmp_path / "shards" / "shards.json")]
    write_manifest(tmp_path / "shards", entries)
    packed = ShardedImages(tmp_path / "shards", verify=True)
    images, _ = fashion_mnist.load("train", tmp_path)
    assert len(packed) == 12
    for index, key in enumerate(packed.keys):
        assert np.array_equal(np.asarray(packed.image(index))[..., 0], images[int(key)])
