"""A LAION-like table of HTTP addresses: what is wanted is fetched, what is not is never asked for."""

import json
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

GOOD = 7


class Photos(BaseHTTPRequestHandler):
    """``/good/<n>`` whole JPEGs, ``/broken/<n>`` half ones, ``/page`` HTML; the rest is not found."""

    def do_GET(self):
        self.server.asked[self.path] += 1
        kind, _, number = self.path.strip("/").partition("/")
        if kind == "page":
            self.answer(b"<html>no image</html>", "text/html")
        elif kind in ("good", "broken", "unwanted"):
            photo = self.server.photos[int(number)].read_bytes()
            self.answer(photo[: len(photo) // 2] if kind == "broken" else photo, "image/jpeg")
        else:
            self.send_error(404)

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server(photos):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Photos)
    server.photos = sorted(photos.glob("*.JPEG"))[:GOOD]
    server.asked = Counter()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def table_rows(address, photos):
    """Rows as LAION has them, by what is to become of them."""
    row = {"TEXT": "a photo", "WIDTH": 500, "HEIGHT": 400, "similarity": 0.35, "punsafe": 0.01}
    rows = [row | {"URL": f"{address}/good/{i}"} for i in range(GOOD)]
    rows += [row | {"URL": f"{address}/{path}"} for path in ("gone/0", "page", "broken/0")]
    rows += [
        row | {"URL": f"{address}/unwanted/0", "punsafe": 0.9},
        row | {"URL": f"{address}/unwanted/1", "punsafe": None},
        row | {"URL": f"{address}/unwanted/2", "WIDTH": 100},
        row | {"URL": f"{address}/unwanted/3", "HEIGHT": None},
        row | {"URL": f"{address}/unwanted/4", "similarity": 0.1},
        row | {"URL": photos[0].as_uri()},
        row | {"URL": None},
    ]
    return rows


@pytest.fixture(scope="module")
def place(server, new_place):
    place = new_place(
        data__source="table",
        data__table="laion/part-*.parquet",
        data__urls="http",
        data__n_samples=GOOD + 3,
        data__filters={"min_side": 200, "min_similarity": 0.3, "max_punsafe": 0.5},
        data__download={"threads": 4, "timeout_s": 5, "retries": 0},
        data__shard_size=4,
        data__shards_per_job=2,
        data__eval={"source": "imagefolder", "path": "labelled", "n_samples": None},
    )
    rows = table_rows(f"http://127.0.0.1:{server.server_port}", server.photos)
    (place / "laion").mkdir()
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part::2]), place / f"laion/part-{part}.parquet")
    for number, photo in enumerate(server.photos):
        folder = place / f"labelled/class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).symlink_to(photo)
    place.finish("check", "data", "evaluation_data")
    return place


def test_every_wanted_address_is_in_the_ledger(place, server):
    ledger = pq.read_table(place / "results/data/ledger.parquet").to_pylist()
    statuses = {row["url"].split("/", 3)[3]: row["status"] for row in ledger}
    assert len(ledger) == len(statuses) == GOOD + 3
    assert [statuses[f"good/{i}"] for i in range(GOOD)] == ["ok"] * GOOD
    assert statuses["gone/0"].startswith("not downloaded: HTTP Error 404")
    assert statuses["page"] == statuses["broken/0"] == "not downloaded: Image decoding error"


def test_counts_say_why_rows_are_not_there(place):
    metrics = json.loads((place / "results/data/metrics.json").read_text())
    assert metrics["images"] == {"ok": GOOD, "not downloaded": 3}
    assert metrics["table"] == {
        "rows": GOOD + 10,
        "url not http": 2,
        "too small": 2,
        "too dissimilar": 1,
        "unsafe or unjudged": 2,
        "selected": GOOD + 3,
    }
    assert metrics["samples"] == GOOD


def test_unwanted_addresses_are_never_asked_for(place, server):
    wanted = {f"/good/{i}" for i in range(GOOD)} | {"/gone/0", "/page", "/broken/0"}
    assert set(server.asked) == wanted


def test_shards_hold_the_photos_to_the_byte(place, server):
    manifest = json.loads((place / "results/data/manifest.json").read_text())
    assert [shard["name"] for shard in manifest["shards"]] == ["00000", "00001", "00002"]
    stored = []
    for shard in manifest["shards"]:
        with tarfile.open(place / f"results/data/{shard['name']}.tar") as tar:
            names = tar.getnames()
            assert len(names) == shard["samples"]
            stored += [tar.extractfile(name).read() for name in names]
    assert sorted(stored) == sorted(photo.read_bytes() for photo in server.photos)


def test_evaluation_images_keep_their_folders_labels(place):
    rows = pq.read_table(place / "results/evaluation_data/00000.parquet").to_pylist()
    rows += pq.read_table(place / "results/evaluation_data/00001.parquet").to_pylist()
    assert len(rows) == GOOD
    for row in rows:
        assert row["name"].startswith(f"labelled/class-{row['label']}/")
