"""Only what no run of the params asks for goes."""

import os

import pytest
from dgmr import clean, params
from dgmr.keys import Keys

STAGE = {"train": "mlp", "samples": 640, "lr": 1e-3}
VALUES = {
    "teacher": {"model": "vit_tiny_patch16_224"},
    "data": {"source": "table", "table": "t.parquet", "urls": "http", "n_samples": 300},
    "prune": {"ratio": 1.0},
    "distill": {"stages": {"mlp": STAGE | {"prune": {"ratio": 0.5}}}},
    "sweep": {"prune.ratio": [0.5]},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return params.validate(VALUES)


def write(path, size=1000):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def make_work(folder, keys):
    work = folder / "work"
    for key in keys:
        write(work / "features" / key / "targets/00000/00000.safetensors")
        write(work / "evaluate/accuracy" / f"{key}.json", 10)
    return work


def test_nothing_that_a_run_asks_for_goes(config, tmp_path):
    runs = [config, *config.points().values()]
    used = {key for run in runs for key in Keys(run).of_work()}
    work = make_work(tmp_path, [*used, "0123456789ab"])
    write(work / "hashes.json")
    write(work / "evaluate/accuracy/0123456789ab.json.partial", 10)
    write(work / "features/0123456789abc/no.key")
    write(work / "fashion-mnist/train-images-idx3-ubyte.gz")
    write(work / "benchmark/targets/00000.tsv")
    write(work / "benchmark/prune_again" / Keys(config).prune_again("mlp") / "results/mlp.tsv")
    found = clean.unneeded(config)
    assert {str(each.path) for each in found} == {
        "work/features/0123456789ab",
        "work/evaluate/accuracy/0123456789ab.json",
        "work/evaluate/accuracy/0123456789ab.json.partial",
    }
    assert sum(each.frees for each in found) == 1020
    clean.remove(found)
    assert clean.unneeded(config) == [] and len(list(work.rglob("*.safetensors"))) == len(used)


def test_without_the_sweep_its_points_go(config, tmp_path):
    (point,) = config.points().values()
    make_work(tmp_path, [Keys(point).refits, Keys(config).refits])
    alone = config.model_copy(update={"sweep": {}})
    assert not clean.unneeded(config)
    assert {each.path.stem for each in clean.unneeded(alone)} == {Keys(point).refits}


def test_downloads_go_once_they_are_packed(config, tmp_path):
    keys = Keys(config)
    write(tmp_path / "work/data" / keys.downloads / "downloads/00000/00000.tar", 5000)
    assert not clean.unneeded(config)
    write(tmp_path / "results/data" / f"{keys.data}.stamp", 0)
    (found,) = clean.unneeded(config)
    assert found.frees == 5000 and found.reason == "packed into shards"


def test_shards_that_results_has_too_free_nothing(config, tmp_path):
    shard = write(tmp_path / "work/data/0123456789ab/shards/00000/00000.tar", 7000)
    write(shard.with_suffix(".parquet"), 30)
    (tmp_path / "results/data").mkdir(parents=True)
    os.link(shard, tmp_path / "results/data/00000.tar")
    (found,) = clean.unneeded(config)
    assert found.frees == 30


def test_no_work_is_nothing_to_free(config):
    assert clean.unneeded(config) == []
