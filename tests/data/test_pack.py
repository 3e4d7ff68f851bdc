"""What becomes of an image, good or bad, on its way into a shard."""

import io
import json
from collections import Counter
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from dgmr.data.pack import LEDGER, SHARDS, normalised, pack
from dgmr.files import read_json
from dgmr.shards import Shard, ShardedImages, decode, write_manifest
from pictures import encoded, picture
from PIL import Image, features


def write_rows(path, urls, shards=("00000",)):
    """Selected rows, as the select step writes them, dealt to ``shards`` in turn."""
    count = len(urls)
    columns = {
        "sample_key": [f"{index:09d}" for index in range(count)],
        "shard": [shards[index * len(shards) // count] for index in range(count)],
        "url": pa.array(urls, pa.string()),
        "caption": [f"caption {index}" for index in range(count)],
        "punsafe": [index / 100 for index in range(count)],
    }
    pq.write_table(pa.table(columns), path)
    return path


def packed(folder, urls, shards=("00000",), downloaded=None, image_size=None):
    """Statuses by URL, and the packed images by key."""
    rows, output = write_rows(folder / "rows.parquet", urls, shards), folder / "packed"
    places = {"table_folder": folder, "downloaded": downloaded, "image_size": image_size}
    pack(rows, list(shards), output, **places)
    write_manifest(output, [Shard(**entry) for entry in read_json(output / SHARDS)])
    ledger = pq.read_table(output / LEDGER).to_pylist()
    assert [row["key"] for row in ledger] == [f"{index:09d}" for index in range(len(urls))]
    return {row["url"]: row["status"] for row in ledger}, ShardedImages(output, verify=True)


def stored(folder, shard="00000"):
    """Members of the samples in a shard, by key, as webdataset reads them."""
    tar = str(folder / "packed" / f"{shard}.tar")
    samples = webdataset.WebDataset(tar, shardshuffle=False, empty_check=False)
    return {
        sample["__key__"]: {name: sample[name] for name in sample if not name.startswith("__")}
        for sample in samples
    }


def test_good_images_are_kept_to_the_byte(tmp_path):
    contents = {
        "a.jpg": encoded(picture(1), "JPEG"),
        "b.png": encoded(picture(2), "PNG"),
        "c.webp": encoded(picture(3), "WEBP"),
        "cmyk.jpg": encoded(picture(4).convert("CMYK"), "JPEG"),
        "gray.jpg": encoded(picture(5).convert("L"), "JPEG"),
        "named.png": encoded(picture(6), "JPEG"),  # it counts what it is
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    statuses, images = packed(tmp_path, list(contents))
    assert set(statuses.values()) == {"ok"}
    extensions = ["jpg", "png", "webp", "jpg", "jpg", "jpg"]
    assert list(stored(tmp_path).values()) == [
        {extension: content}
        for extension, content in zip(extensions, contents.values(), strict=True)
    ]
    assert images.labels == [None] * 6


def test_bad_images_are_told_and_left_out(tmp_path):
    good = encoded(picture(0, (200, 150)), "JPEG")
    contents = {
        "good.jpg": good,
        "cut.jpg": good[: len(good) // 2],
        "page.jpg": b"<html>404</html>",
        "empty.jpg": b"",
        "cut.png": encoded()[:-40],
        "last.jpg": good,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    statuses, images = packed(tmp_path, [*list(contents)[:-1], "no.jpg", "folder.jpg", "last.jpg"])
    assert statuses["good.jpg"] == statuses["last.jpg"] == "ok"
    for name in ("cut.jpg", "page.jpg", "empty.jpg", "cut.png"):
        assert statuses[name].startswith("broken image: "), name
    assert statuses["no.jpg"] == "unreadable file: No such file or directory"
    assert statuses["folder.jpg"] == "unreadable file: Is a directory"
    assert images.keys == ["000000000", "000000007"]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own, on what it finds
def test_damaged_bytes_never_stop_the_room(tmp_path, format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = encoded(picture(0, (60, 40)), format)
    draw = np.random.default_rng(0)
    names = [f"{index}.jpg" for index in range(40)]
    for name in names:
        damaged = bytearray(content[: draw.integers(len(content) // 2, len(content))])
        for place in draw.integers(0, min(len(damaged), 300), 6):
            damaged[place] = draw.integers(256)
        (tmp_path / name).write_bytes(damaged)
    statuses, _ = packed(tmp_path, names)
    found = Counter(status.partition(":")[0] for status in statuses.values())
    assert (
        found.total() == 40 and found["broken image"] > 20 and set(found) <= {"ok", "broken image"}
    )


def test_decompression_bomb_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "bomb.png").write_bytes(encoded(Image.new("L", (30, 30))))
    statuses, images = packed(tmp_path, ["bomb.png"])
    assert statuses["bomb.png"].startswith("broken image: ") and "bomb" in statuses["bomb.png"]
    assert len(images) == 0


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_become_png_without_loss(tmp_path, format):
    (tmp_path / "a").write_bytes(encoded(picture(), format))
    packed(tmp_path, ["a"])
    ((extension, content),) = stored(tmp_path)["000000000"].items()
    assert extension == "png"
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG"
    assert np.array_equal(decode(content), decode((tmp_path / "a").read_bytes()))


def test_first_frame_of_an_animation_counts(tmp_path):
    frames = [picture(index) for index in range(3)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").write_bytes(content)
    _, images = packed(tmp_path, ["a.gif"])
    assert np.array_equal(images.image(0), decode(encoded(frames[0], "GIF")))


def test_jpeg_with_more_pictures_behind_it_is_a_jpeg(tmp_path):
    content = encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    assert normalised(content, None) == (content, "jpg")
    assert np.abs(np.subtract(decode(content), picture(1), dtype=int)).mean() < 4


@pytest.mark.parametrize(
    ("size", "limit", "shrunk"),
    [
        ((40, 30), 30, None),
        ((40, 30), 31, None),
        ((40, 30), 29, (39, 29)),
        ((30, 60), 10, (10, 20)),
        ((90, 30), 20, (60, 20)),
        ((20, 20), 7, (7, 7)),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_images_shrink_to_a_shorter_side(size, limit, shrunk, format):
    content = encoded(picture(0, size), format)
    result, extension = normalised(content, limit)
    assert decode(result).size == (shrunk or size)
    if shrunk is None and format != "BMP":
        assert result == content
    assert extension == {
        "JPEG": "jpg",
        "WEBP": "png" if shrunk else "webp",
    }.get(format, "png")


def test_shrunk_image_shows_the_same(tmp_path):
    image = picture(3, (160, 120))
    for format in ("JPEG", "PNG"):
        small = decode(normalised(encoded(image, format), 60)[0])
        wanted = image.resize((80, 60), Image.Resampling.LANCZOS)
        assert np.abs(np.subtract(small, wanted, dtype=int)).mean() < 3
        assert np.abs(np.subtract(small, wanted.rotate(180), dtype=int)).mean() > 20


def test_shrunk_image_stays_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(0, (80, 40)), "JPEG", exif=exif)
    result, _ = normalised(content, 20)
    assert decode(result).size == (20, 40)
    difference = np.subtract(decode(result), decode(content).resize((20, 40)), dtype=int)
    assert np.abs(difference).mean() < 8


def test_urls_of_files(tmp_path):
    """Relative to the table, percent-encoded, absolute, and with a scheme: all name a file."""
    content = encoded()
    (tmp_path / "sub folder").mkdir()
    (tmp_path / "sub folder" / "a#b?c%d é.png").write_bytes(content)
    (tmp_path / "plain.png").write_bytes(content)
    name = quote("sub folder/a#b?c%d é.png")
    assert "%20" in name and "%23" in name and "%C3%A9" in name
    urls = [
        "plain.png",
        "./plain.png",
        name,
        f"{tmp_path}/plain.png",
        f"file://{tmp_path}/plain.png",
        f"FILE://{tmp_path}/{name}",
    ]
    statuses, images = packed(tmp_path, urls)
    assert set(statuses.values()) == {"ok"} and len(images) == len(urls)


def test_rows_go_to_their_shards(tmp_path):
    for index in range(5):
        (tmp_path / f"{index}.png").write_bytes(encoded(picture(index)))
    (tmp_path / "4.png").write_bytes(b"")
    shards = ("00007", "00008", "00009")
    _, images = packed(tmp_path, [f"{index}.png" for index in range(5)], shards)
    assert [images.locate(index) for index in range(4)] == [
        ("00007", 0),
        ("00007", 1),
        ("00008", 0),
        ("00008", 1),
    ]
    assert [shard.samples for shard in images.shards] == [2, 2, 0]
    ledger = pq.read_table(tmp_path / "packed" / LEDGER)["shard"].to_pylist()
    assert ledger == ["00007", "00007", "00008", "00008", "00009"]


def test_rows_of_the_table_come_along(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    packed(tmp_path, ["no.png", "a.png"])
    (row,) = pq.read_table(tmp_path / "packed" / "00000.parquet").to_pylist()
    about = {name: row[name] for name in ("key", "url", "caption", "punsafe")}
    assert about == {"key": "000000001", "url": "a.png", "caption": "caption 1", "punsafe": 0.01}
    assert "shard" not in row and "sample_key" not in row


def test_equal_rows_give_equal_bytes(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded())
        (tmp_path / name / "b.bmp").write_bytes(encoded(format="BMP"))
        packed(tmp_path / name, ["a.png", "b.bmp", "no"])
    for file in ("00000.tar", "00000.parquet", SHARDS, LEDGER):
        first, second = (tmp_path / name / "packed" / file for name in "ab")
        assert first.read_bytes() == second.read_bytes()


def write_downloads(folder, number, images, errors):
    """One shard of what img2dataset leaves: tar of jpg, json and txt; Parquet of all URLs; stats.

    ``images`` and ``errors`` are by sample key; img2dataset numbers them by itself, in any order.
    """
    folder.mkdir(exist_ok=True)
    metas = []
    with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as tar:
        for position, (key, outcome) in enumerate([*images.items(), *errors.items()]):
            done = key in images
            meta = {
                "url": f"http://host/{key}",
                "caption": "a.caption",
                "sample_key": key,
                "key": f"{number:05d}{position:04d}",
                "status": "success" if done else "failed_to_download",
                "error_message": None if done else outcome,
                "sha256": None,
            }
            metas.append(meta)
            if done:
                members = {"jpg": outcome, "json": json.dumps(meta).encode(), "txt": b"a.caption"}
                tar.write({"__key__": meta["key"]} | members)
    pq.write_table(pa.Table.from_pylist(metas), folder / f"{number:05d}.parquet")
    (folder / f"{number:05d}_stats.json").write_text("{}")


def test_downloaded_images_are_found_by_their_key(tmp_path):
    pictures = [encoded(picture(index), "PNG" if index == 1 else "JPEG") for index in range(6)]
    first = {"000000004": pictures[4], "000000001": pictures[1]}
    second = {"000000000": pictures[0], "000000003": b"<html>not here</html>"}
    downloads = tmp_path / "downloads"
    write_downloads(downloads, 0, first, {"000000002": "HTTP Error 404: Not Found"})
    write_downloads(downloads, 1, second, {})
    # the last one, 5, got lost altogether; number 2 stands in img2dataset's Parquet only
    urls = [f"http://host/{index:09d}" for index in range(6)]
    statuses, images = packed(tmp_path, urls, ("00000", "00001"), downloads)
    assert list(statuses.values())[:3] == ["ok", "ok", "not downloaded: HTTP Error 404: Not Found"]
    assert statuses[urls[3]].startswith("broken image: ")
    assert statuses[urls[4]] == "ok"
    assert statuses[urls[5]] == "not downloaded: no answer"
    assert images.keys == ["000000000", "000000001", "000000004"]
    members = stored(tmp_path, "00000") | stored(tmp_path, "00001")
    # its bytes as they were sent, whatever img2dataset called them
    assert members["000000000"] == {"jpg": pictures[0]}
    assert members["000000001"] == {"png": pictures[1]}
    assert members["000000004"] == {"jpg": pictures[4]}


def test_nothing_downloaded_at_all(tmp_path):
    write_downloads(tmp_path / "downloads", 0, {}, {"000000000": "timed out"})
    statuses, images = packed(tmp_path, ["http://host/0"], downloaded=tmp_path / "downloads")
    assert statuses == {"http://host/0": "not downloaded: timed out"} and len(images) == 0


def test_photos_are_packed_to_the_byte_and_shrunk(photos, tmp_path):
    paths = sorted(photos.glob("*.JPEG"))[::10]
    urls = [path.as_uri() for path in paths]
    statuses, images = packed(tmp_path, urls)
    assert set(statuses.values()) == {"ok"} and len(images) == len(paths) > 20
    for path, members in zip(paths, stored(tmp_path).values(), strict=True):
        assert members == {"jpg": path.read_bytes()}

    _, small = packed(tmp_path, urls, image_size=64)
    assert {min(small.image(index).size) for index in range(len(small))} == {64}
