"""Shards: what goes in comes out, by any way of reading; what is not the one listed is refused."""

import hashlib
import io
import pickle
import random
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from dgmr import shards
from dgmr.errors import DgmrError
from dgmr.shards import Sample, ShardedImages
from pictures import encoded, picture
from PIL import Image, ImageOps

COUNTS = (3, 0, 4)  # one shard is empty


def samples(count, first=0, labelled=True):
    kinds = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]
    for index in range(first, first + count):
        format, extension = kinds[index % 3]
        image = encoded(picture(index, (20 + index, 16)), format)
        about = {"url": f"u/{index}", "caption": None if index % 2 else "words"}
        yield Sample(f"{index:09d}", image, extension, index % 5 if labelled else None, about)


def write(folder, counts=COUNTS, **about):
    folder.mkdir(parents=True, exist_ok=True)
    written, first = [], 0
    for number, count in enumerate(counts):
        written.append(shards.write_shard(folder, f"{number:05d}", samples(count, first)))
        first += count
    shards.write_manifest(folder, written, **about)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", seed=3)


def same(image, other):
    return image.mode == other.mode == "RGB" and np.array_equal(image, other)


def test_round_trip(folder):
    images = ShardedImages(folder, verify=True)
    wanted = list(samples(7))
    assert len(images) == 7
    assert images.keys == [sample.key for sample in wanted]
    assert images.labels == [sample.label for sample in wanted]
    for index, sample in enumerate(wanted):
        assert same(images.image(index), Image.open(io.BytesIO(sample.image)).convert("RGB"))


def test_manifest_says_what_is_there(folder):
    manifest = shards.read_json(folder / shards.MANIFEST)
    assert manifest["seed"] == 3 and manifest["samples"] == 7
    assert [entry["samples"] for entry in manifest["shards"]] == [3, 0, 4]
    for entry in manifest["shards"]:
        content = (folder / f"{entry['name']}.tar").read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_rows_stand_beside_the_tar(folder):
    rows = pq.read_table(folder / "00002.parquet").to_pylist()
    tar = (folder / "00002.tar").read_bytes()
    for row, sample in zip(rows, samples(4, first=3), strict=True):
        assert (row["key"], row["label"]) == (sample.key, sample.label)
        assert {name: row[name] for name in sample.columns} == sample.columns
        assert tar[row["offset"] : row["offset"] + row["size"]] == sample.image
        assert row["sha256"] == hashlib.sha256(sample.image).hexdigest()


def test_equal_samples_give_equal_bytes(folder, tmp_path, monkeypatch):
    tomorrow = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    again = write(tmp_path / "again", seed=3)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 7 and names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_plain_webdataset_reads_the_same(folder):
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    found = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    for read, sample in zip(found, samples(7), strict=True):
        assert read["__key__"] == sample.key
        assert read[sample.extension] == sample.image
        assert int(read["cls"]) == sample.label


def test_plain_webdataset_decodes_the_same(folder):
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil")
    images = ShardedImages(folder)
    for index, (image, label) in enumerate(dataset.to_tuple("png;jpg;webp", "cls")):
        assert same(images.image(index), image) and images.labels[index] == label


def test_random_access_is_sequential_access(folder):
    images = ShardedImages(folder)
    in_order = [(images.locate(i), images.image(i)) for i in range(7)]
    assert [place for place, _ in in_order] == [("00000", i) for i in range(3)] + [
        ("00002", i) for i in range(4)
    ]
    shuffled = random.Random(0).sample(range(7), 7) + [0, 0, 6]
    for index in shuffled:
        assert same(images.image(index), in_order[index][1])


def test_some_shards_only(folder):
    images = ShardedImages(folder, ["00002"])
    assert images.keys == [sample.key for sample in samples(4, first=3)]
    assert images.locate(3) == ("00002", 3)
    assert len(ShardedImages(folder, ["00001"])) == 0
    with pytest.raises(DgmrError, match=r"manifest.json lists no shard 00007, 00009"):
        ShardedImages(folder, ["00000", "00009", "00007"])


@pytest.mark.parametrize(
    ("samples", "names"),
    [(0, 0), (1, 1), (3, 1), (4, 3), (7, 3), (8, 4), (9, 4), (1000, 5)],
)
def test_first_shards_that_hold_enough(tmp_path, samples, names):
    write(tmp_path, (3, 0, 4, 2, 0))
    found = shards.first(tmp_path, samples)
    assert found == [f"{number:05d}" for number in range(names)]
    assert len(ShardedImages(tmp_path, found)) >= min(samples, 9)


def test_first_shards_of_no_manifest(tmp_path):
    with pytest.raises(DgmrError, match=r"has no manifest\.json: run the data stage first"):
        shards.first(tmp_path, 1)


def test_no_labels(tmp_path):
    shard = shards.write_shard(tmp_path, "00000", samples(2, labelled=False))
    shards.write_manifest(tmp_path, [shard])
    assert ShardedImages(tmp_path).labels == [None, None]
    tar = str(tmp_path / "00000.tar")
    assert all("cls" not in sample for sample in webdataset.WebDataset(tar, shardshuffle=False))


def test_goes_to_a_spawned_process(folder):
    images = pickle.loads(pickle.dumps(ShardedImages(folder)))  # noqa: S301 - our own bytes
    assert same(images.image(5), ShardedImages(folder).image(5))


@pytest.mark.parametrize("key", ["", "A", "a.b", "a/b", "a" * 65, "ä", "a\n"])
def test_key_of_other_letters_is_refused(tmp_path, key):
    with pytest.raises(DgmrError, match="is not made of 1 to 64 of a-z 0-9 _ -") as error:
        shards.write_shard(tmp_path, "00000", [Sample(key, encoded(), "png")])
    assert repr(key) in str(error.value) and "shard 00000" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_key_that_comes_twice_is_refused(tmp_path):
    twice = [Sample("a", encoded(), "png"), Sample("a", encoded(), "jpg")]
    with pytest.raises(DgmrError, match="'a' comes twice"):
        shards.write_shard(tmp_path, "00000", twice)
    assert list(tmp_path.iterdir()) == []


def test_longest_key_is_kept(tmp_path):
    key = "a0_-" * 16
    shard = shards.write_shard(tmp_path, "00000", [Sample(key, encoded(), "png")])
    shards.write_manifest(tmp_path, [shard])
    assert ShardedImages(tmp_path).keys == [key]


def test_no_manifest_is_refused(tmp_path):
    with pytest.raises(DgmrError, match=r"has no manifest\.json: run the data stage first"):
        ShardedImages(tmp_path)


def refused(folder, match, **options):
    with pytest.raises(DgmrError, match=match) as error:
        ShardedImages(folder, **options)
    assert f"delete {folder / 'manifest.json'} and run snakemake again." in str(error.value)


@pytest.mark.parametrize("name", ["00002.tar", "00002.parquet"])
def test_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, r"00002\.tar is listed in manifest\.json but its tar or Parquet is missing")
    assert len(ShardedImages(folder, ["00000"])) == 3  # the others are none the worse


@pytest.mark.parametrize("name", ["00002.tar", "00002.parquet"])
def test_cut_off_file_is_refused(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-100])
    refused(folder, r"00002\.tar is not the shard that manifest\.json lists")


def test_shard_of_another_run_is_refused(folder, tmp_path):
    other = write(tmp_path / "other", (3, 0, 20))
    (folder / "00002.tar").write_bytes((other / "00002.tar").read_bytes())
    refused(folder, r"00002\.tar is not the shard")


def test_rows_of_another_run_are_refused(folder, tmp_path):
    other = write(tmp_path / "other", (3, 0, 5))
    (folder / "00002.parquet").write_bytes((other / "00002.parquet").read_bytes())
    refused(folder, r"00002\.tar is not the shard")


def test_same_size_other_bytes_are_refused_by_their_hash(folder):
    content = bytearray((folder / "00002.tar").read_bytes())
    content[600] ^= 1
    (folder / "00002.tar").write_bytes(content)
    refused(folder, r"00002\.tar is not the shard", verify=True)
    assert len(ShardedImages(folder)) == 7  # hashing is for those who ask


def test_shard_is_linked_whole(folder, tmp_path):
    (tmp_path / "published").mkdir()
    shards.link_shard(folder, tmp_path / "published", "00002")
    names = ["00002.parquet", "00002.tar"]
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == names
    for name in names:
        assert (tmp_path / "published" / name).samefile(folder / name)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_comes_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture(size=(40, 30))
    decoded = shards.decode(encoded(stored, "PNG", exif=exif))
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    assert same(decoded, stored if turn is None else stored.transpose(turn))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG"), ("P", "GIF")]
    + [("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("CMYK", "TIFF")],
)
def test_every_colour_mode_becomes_rgb(mode, format):
    colours = picture(size=(64, 48))
    stored = colours.quantize(16) if mode == "P" else colours.convert(mode)
    decoded = shards.decode(encoded(stored, format))
    assert decoded.mode == "RGB" and decoded.size == (64, 48)
    # Equal but for what JPEG and WebP lose; any other reading of the channels is far off.
    lossy = format in ("JPEG", "WEBP")
    assert np.abs(np.subtract(decoded, stored.convert("RGB"), dtype=int)).mean() <= 4 * lossy


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(shards.decode(encoded(Image.fromarray(values))))
    assert decoded[..., 0].tolist() == (values >> 8).tolist()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_cut_off_image_is_no_image(format, part):
    content = encoded(picture(size=(200, 150)), format)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        shards.decode(content[: int(len(content) * part)])


def test_photos_decode_as_pillow_has_them(photos):
    paths = sorted(photos.glob("*.JPEG"))[::12]
    gray = 0
    for path in paths:
        with Image.open(path) as image:
            gray += image.mode == "L"
            wanted = ImageOps.exif_transpose(image).convert("RGB")
        assert same(shards.decode(path.read_bytes()), wanted)
    assert len(paths) > 15


def test_photos_go_through_shards(photos, tmp_path):
    paths = sorted(photos.glob("*.JPEG"))[:20]
    content = (Sample(f"{i:09d}", path.read_bytes(), "jpg", i % 7) for i, path in enumerate(paths))
    shards.write_manifest(tmp_path, [shards.write_shard(tmp_path, "00000", content)])
    images = ShardedImages(tmp_path, verify=True)
    for index in (19, 0, 7):
        assert same(images.image(index), shards.decode(paths[index].read_bytes()))
