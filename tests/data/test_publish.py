"""results/data: linked shards, and a manifest that comes last."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgmr.data import publish as module
from dgmr.data.evaluation import make
from dgmr.data.pack import LEDGER, pack
from dgmr.data.publish import publish, publish_evaluation
from dgmr.data.select import select
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.params import Data, EvaluationData
from dgmr.shards import ShardedImages
from pictures import encoded, picture


def table(path, urls):
    pq.write_table(pa.table({"URL": urls}), path)
    return str(path)


@pytest.fixture
def way(tmp_path):
    """The steps before: 5 rows in two jobs, one of them missing, one broken."""
    names = [f"{index}.png" for index in range(5)]
    for index, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(picture(index)))
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"<html>")
    urls = {"urls": "file", "source": "table", "table": "t", "filters": {"max_punsafe": None}}
    sizes = {"n_samples": 5, "shard_size": 2, "shards_per_job": 2}
    config = Data.model_validate(urls | sizes)
    select(table(tmp_path / "t.parquet", names), config, tmp_path / "selection")
    for job, shards in config.jobs.items():
        rows, output = tmp_path / "selection" / f"{job}.parquet", tmp_path / "jobs" / job
        pack(rows, shards, output, table_folder=tmp_path, downloaded=None, image_size=None)
    return {
        "jobs": sorted((tmp_path / "jobs").iterdir()),
        "selection": tmp_path / "selection" / "selection.json",
        "output": tmp_path / "results",
    }


def test_all_is_gathered(way):
    publish(**way)
    output = way["output"]
    images = ShardedImages(output, verify=True)
    assert [shard.name for shard in images.shards] == ["00000", "00001", "00002"]
    assert sorted(images.keys) == ["000000000", "000000003", "000000004"]
    assert (output / "00001.tar").stat().st_nlink == 2  # no second copy on the disk


def test_evaluation_shards_are_gathered_apart(tmp_path, small_fashion_mnist):
    make(EvaluationData(n_samples=6), 4, tmp_path / "made", tmp_path)
    publish_evaluation(tmp_path / "made", tmp_path / "eval")
    images = ShardedImages(tmp_path / "eval", verify=True)
    assert [shard.samples for shard in images.shards] == [4, 2]
    assert images.manifest["source"] == "fashion-mnist"
    assert (tmp_path / "eval/00000.parquet").stat().st_nlink == 2


def test_ledger_holds_every_row(way):
    publish(**way)
    ledger = pq.read_table(way["output"] / LEDGER).to_pylist()
    found = {row["url"]: row["status"].partition(":")[0] for row in ledger}
    assert found == {
        "0.png": "ok",
        "1.png": "unreadable file",
        "2.png": "broken image",
        "3.png": "ok",
        "4.png": "ok",
    }


def test_metrics_count_what_happened(way):
    publish(**way)
    assert read_json(way["output"] / module.METRICS) == {
        "samples": 3,
        "table": {"rows": 5, "selected": 5, "url not file": 0},
        "images": {"ok": 3, "unreadable file": 1, "broken image": 1},
    }


def test_no_image_at_all_is_refused(way, tmp_path):
    config = Data.model_validate({"urls": "file", "n_samples": 2})
    unsafe = config.model_copy(
        update={"filters": config.filters.model_copy(update={"max_punsafe": None})}
    )
    select(table(tmp_path / "none.parquet", ["x.png", "y.png"]), unsafe, tmp_path / "none")
    rows, job = tmp_path / "none" / "00000.parquet", tmp_path / "lost"
    pack(rows, ["00000"], job, table_folder=tmp_path, downloaded=None, image_size=None)
    with pytest.raises(DgmrError) as error:
        publish(**way | {"jobs": [job]})
    sentence = str(error.value)
    assert "none of the 2 images of data.table could be had ({'unreadable file': 2})" in sentence
    # It points to a ledger that is still there when Snakemake has removed the failed job's output.
    named = next(Path(word) for word in sentence.split() if word.endswith(LEDGER))
    assert named.is_file() and way["output"] not in named.parents
    assert not (way["output"] / "manifest.json").exists()


def test_manifest_comes_last(way, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        publish(**way)
    assert not (way["output"] / "manifest.json").exists()


def test_published_again_is_the_same(way):
    publish(**way)
    before = {path: path.read_bytes() for path in way["output"].rglob("*") if path.is_file()}
    publish(**way)
    after = {path: path.read_bytes() for path in way["output"].rglob("*") if path.is_file()}
    assert before == after and len(before) == 9
