"""Filtering and drawing the rows of a table."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgmr.data import select as module
from dgmr.data.select import select
from dgmr.errors import DgmrError
from dgmr.params import Data

NO_LIMITS = {"max_punsafe": None}


def config(n_samples=1, filters=None, **changes):
    sizes = {"shard_size": 4, "shards_per_job": 2}
    chosen = {"filters": NO_LIMITS | (filters or {}), "source": "table", "table": "given apart"}
    return Data.model_validate({"n_samples": n_samples} | sizes | chosen | changes)


def table(path, row_group_size=None, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def urls(count, first=0):
    return [f"http://host/{index}.jpg" for index in range(first, first + count)]


def drawn(table, chosen, output):
    """The drawn rows, in the order of the shards."""
    select(table, chosen, output)
    return [
        row for job in chosen.jobs for row in pq.read_table(output / f"{job}.parquet").to_pylist()
    ]


def survivors(folder, chosen, columns):
    """Numbers of the rows that pass, and the counts; all that pass are drawn."""
    count = len(next(iter(columns.values())))
    path = table(folder / "t.parquet", **({"URL": urls(count)} | columns))
    for n_samples in range(count, 0, -1):
        chosen = chosen.model_copy(update={"n_samples": n_samples})
        try:
            rows = drawn(path, chosen, folder / "out")
        except DgmrError:
            continue
        return sorted(int(row["sample_key"]) for row in rows), json.loads(
            (folder / "out" / "selection.json").read_text()
        )
    return [], None


def floats(*values):
    return pa.array(values, pa.float64(), from_pandas=False)


SIZES = {
    "WIDTH": floats(512, 63, 64.0, 640, None, 1000, math.nan, 0),
    "HEIGHT": floats(512, 640, 64.0, None, 640, 100, 640, 0),
}
FILTERS = {
    "shorter side": ({"min_side": 64}, SIZES, [0, 2, 5], "too small"),
    "elongated": ({"max_aspect_ratio": 2}, SIZES, [0, 2], "too elongated"),
    "elongated, either way": ({"max_aspect_ratio": 10.2}, SIZES, [0, 1, 2, 5], "too elongated"),
    "whole sizes": ({"min_side": 64}, {"width": [64, 63], "height": [64, 64]}, [0], "too small"),
    "similarity": (
        {"min_similarity": 0.3},
        {"similarity": floats(0.31, 0.3, 0.29, None, math.nan)},
        [0, 1],
        "too dissimilar",
    ),
    "no score means unsafe": (
        {"max_punsafe": 0.5},
        {"punsafe": floats(0.0, 0.5, 0.51, None, math.nan, 1.0)},
        [0, 1],
        "unsafe or unjudged",
    ),
    "single precision": (
        {"max_punsafe": 0.5},
        {"punsafe": pa.array([0.4, 0.6, None], pa.float32())},
        [0],
        "unsafe or unjudged",
    ),
    "tag": (
        {"max_punsafe": 0.5},
        {"NSFW": ["UNLIKELY", "UNSURE", "NSFW", None, "unlikely", "Unlikely", "", "LIKELY"]},
        [0, 4, 5],
        "unsafe or unjudged",
    ),
    "score before tag": (
        {"max_punsafe": 0.5},
        {"nsfw": ["NSFW", "UNLIKELY", "UNLIKELY"], "PUNSAFE": floats(0.1, 0.9, None)},
        [0],
        "unsafe or unjudged",
    ),
    "all null": (
        {"max_punsafe": 0.5},
        {"punsafe": pa.nulls(3, pa.float64())},
        [],
        "unsafe or unjudged",
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter(tmp_path, name):
    filters, columns, passing, reason = FILTERS[name]
    rows, counts = survivors(tmp_path, config(filters=filters), columns)
    assert rows == passing
    if passing:
        total = len(next(iter(columns.values())))
        selected = len(passing)
        assert counts["rows"] == total and counts["selected"] == selected
        assert counts[reason] == total - selected and counts["url not http"] == 0
        assert set(counts) == {"rows", "selected", "url not http", reason}


def test_no_limit_keeps_what_the_table_does_not_say(tmp_path):
    columns = {name: pa.nulls(3) for name in ("WIDTH", "HEIGHT", "similarity", "punsafe")}
    assert survivors(tmp_path, config(), columns)[0] == [0, 1, 2]


def test_row_counts_for_its_first_reason_only(tmp_path):
    columns = {
        "URL": ["ftp://host/a", *urls(3)],
        "WIDTH": [1, 1, 99, 99],
        "HEIGHT": [1, 1, 99, 99],
        "punsafe": [1.0, 1.0, 1.0, 0.0],
    }
    filters = {"min_side": 64, "max_punsafe": 0.5}
    rows, counts = survivors(tmp_path, config(filters=filters), columns)
    reasons = {"url not http": 1, "too small": 1, "unsafe or unjudged": 1}
    assert rows == [3] and counts == {"rows": 4, "selected": 1} | reasons


ADDRESSES = [
    "http://host/a.jpg",
    "https://host/a.jpg",
    "HTTPS://HOST/A.JPG",
    "file:///etc/passwd",
    "File:///a.jpg",
    "file:a.jpg",
    "ftp://host/a.jpg",
    "data:image/png;base64,AAAA",
    "s3://bucket/a.jpg",
    "C:/a.jpg",
    "images/a.jpg",
    "../a.jpg",
    "/a.jpg",
    "httpx",
    None,
]


@pytest.mark.parametrize(
    ("kind", "allowed"), [("http", [0, 1, 2]), ("file", [3, 4, 5, 10, 11, 12, 13])]
)
@pytest.mark.parametrize("type", [pa.string(), pa.large_string()])
def test_only_urls_of_the_asked_kind(tmp_path, kind, allowed, type):
    rows, counts = survivors(tmp_path, config(urls=kind), {"URL": pa.array(ADDRESSES, type)})
    assert rows == allowed
    assert counts[f"url not {kind}"] == len(ADDRESSES) - len(allowed)


@pytest.mark.parametrize(
    "names",
    [
        ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "NSFW"),
        ("url", "caption", "original_width", "original_height", "clip_similarity", "nsfw"),
        ("Url", "alt_text", "Width", "Height", "SIMILARITY", "Nsfw"),
    ],
)
def test_columns_come_out_under_our_names(tmp_path, names):
    values = (urls(1), ["a text"], [512], [256], [0.3], ["UNLIKELY"])
    path = table(tmp_path / "t.parquet", hash=[1], **dict(zip(names, values, strict=True)))
    (row,) = drawn(path, config(1), tmp_path / "out")
    assert row == {
        "sample_key": "000000000",
        "shard": "00000",
        "url": "http://host/0.jpg",
        "caption": "a text",
        "width": 512,
        "height": 256,
        "similarity": 0.3,
        "nsfw": "UNLIKELY",
    }


def test_caption_is_null_where_there_is_none(tmp_path):
    path = table(tmp_path / "t.parquet", URL=urls(2))
    drawn(path, config(2), tmp_path / "out")
    assert pq.read_schema(tmp_path / "out" / "00000.parquet").field("caption").type == pa.string()


def test_samples_are_dealt_to_shards_and_jobs(tmp_path):
    path = table(tmp_path / "t.parquet", URL=urls(30))
    chosen = config(19)  # shards of 4, jobs of 2 shards
    rows = drawn(path, chosen, tmp_path / "out")
    assert [row["shard"] for row in rows] == [f"{index // 4:05d}" for index in range(19)]
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["00000.parquet", "00001.parquet", "00002.parquet", "selection.json"]
    assert pq.read_metadata(tmp_path / "out" / "00002.parquet").num_rows == 3
    assert len({row["sample_key"] for row in rows}) == 19
    assert all(row["url"] == f"http://host/{int(row['sample_key'])}.jpg" for row in rows)


def keys(rows):
    return [row["sample_key"] for row in rows]


def test_draw_depends_on_the_seed_alone(tmp_path):
    path = table(tmp_path / "t.parquet", URL=urls(200))
    first = keys(drawn(path, config(20), tmp_path / "a"))
    np.random.seed(1)
    assert keys(drawn(path, config(20), tmp_path / "b")) == first
    assert keys(drawn(path, config(20, seed=1), tmp_path / "c")) != first
    assert first != sorted(first)  # an order of its own, too


def test_draw_does_not_depend_on_how_the_file_is_cut(tmp_path, monkeypatch):
    first = keys(
        drawn(
            table(tmp_path / "a.parquet", URL=urls(500)), config(30, shard_size=100), tmp_path / "a"
        )
    )
    cut = table(tmp_path / "b.parquet", row_group_size=17, URL=urls(500))
    assert pq.read_metadata(cut).num_row_groups == 30
    assert keys(drawn(cut, config(30, shard_size=100), tmp_path / "b")) == first
    table(tmp_path / "c-0.parquet", URL=urls(123))
    table(tmp_path / "c-1.parquet", URL=urls(377, first=123))
    assert (
        keys(drawn(f"{tmp_path}/c-*.parquet", config(30, shard_size=100), tmp_path / "c")) == first
    )
    monkeypatch.setattr(module, "_BATCH_ROWS", 7)
    assert keys(drawn(cut, config(30, shard_size=100), tmp_path / "d")) == first


def test_little_is_kept_in_memory(tmp_path, monkeypatch):
    path = table(tmp_path / "t.parquet", URL=urls(1000))
    whole = keys(drawn(path, config(10), tmp_path / "a"))
    lengths = []
    lowest = module._lowest

    def recorded(rows, count):
        lengths.append(len(rows))
        return lowest(rows, count)

    monkeypatch.setattr(module, "_lowest", recorded)
    monkeypatch.setattr(module, "_BATCH_ROWS", 8)
    assert keys(drawn(path, config(10), tmp_path / "b")) == whole
    assert len(lengths) > 20 and max(lengths) <= 10 + 5 * 8


def test_smaller_draw_is_the_start_of_a_larger_one(tmp_path):
    path = table(tmp_path / "t.parquet", URL=urls(300))
    larger = keys(drawn(path, config(100, shard_size=100), tmp_path / "a"))
    assert keys(drawn(path, config(33, shard_size=100), tmp_path / "b")) == larger[:33]


def test_stricter_filter_draws_from_the_same_order(tmp_path):
    scores = np.random.default_rng(0).random(400)
    path = table(tmp_path / "t.parquet", URL=urls(400), punsafe=scores)
    everything = keys(drawn(path, config(400, shard_size=100), tmp_path / "a"))
    strict = config(100, filters={"max_punsafe": 0.5}, shard_size=100)
    passing = [key for key in everything if scores[int(key)] <= 0.5]
    assert keys(drawn(path, strict, tmp_path / "b")) == passing[:100]


def test_every_row_has_the_same_chance(tmp_path):
    rows, n_samples, draws = 400, 100, 25
    path = table(tmp_path / "t.parquet", row_group_size=9, URL=urls(rows))
    times = np.zeros(rows)
    for seed in range(draws):
        found = keys(drawn(path, config(n_samples, shard_size=100, seed=seed), tmp_path / "out"))
        assert len(set(found)) == n_samples
        times[[int(key) for key in found]] += 1
    variance = draws * (n_samples / rows) * (1 - n_samples / rows)
    chi_squared = ((times - draws * n_samples / rows) ** 2 / variance).mean()
    assert 0.7 < chi_squared < 1.3  # 4 of its standard deviations around 1
    halves = times[:200].sum(), times[200:].sum()
    assert abs(halves[0] - halves[1]) < 4 * np.sqrt(rows * variance)


def test_tables_of_one_release_may_differ(tmp_path):
    """Widths whole in one file and floats in the next, a score that is all null, a missing caption."""
    table(tmp_path / "0.parquet", URL=urls(2), WIDTH=[512, 10], HEIGHT=[512, 10], TEXT=["a", "b"])
    table(
        tmp_path / "1.parquet",
        url=pa.array(urls(2, first=2), pa.large_string()),
        width=floats(512.0, None),
        height=floats(512.0, 512.0),
        similarity=pa.nulls(2, pa.float64()),
    )
    chosen = config(2, filters={"min_side": 64})
    rows = drawn(f"{tmp_path}/?.parquet", chosen, tmp_path / "out")
    found = {row["url"]: (row["width"], row["caption"], row["similarity"]) for row in rows}
    assert found == {
        "http://host/0.jpg": (512, "a", None),
        "http://host/2.jpg": (512, None, None),
    }
    counts = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert counts == {"rows": 4, "selected": 2, "url not http": 0, "too small": 2}


def test_each_file_needs_the_columns(tmp_path):
    table(tmp_path / "0.parquet", URL=urls(5), punsafe=[0.0] * 5)
    table(tmp_path / "1.parquet", URL=urls(5))
    with pytest.raises(DgmrError, match=r"1\.parquet has no column punsafe or nsfw"):
        select(f"{tmp_path}/*.parquet", config(1, filters={"max_punsafe": 0.5}), tmp_path / "out")


def test_too_few_rows_are_told_with_the_reasons(tmp_path):
    columns = {"URL": ["ftp://a", *urls(5)], "punsafe": [0.0, 0.0, 0.0, 1.0, 1.0, None]}
    path = table(tmp_path / "t.parquet", **columns)
    with pytest.raises(DgmrError) as error:
        select(path, config(3, filters={"max_punsafe": 0.5}), tmp_path / "out")
    assert str(error.value) == (
        f"data.table: only 2 of 6 rows of {path} pass (url not http: 1, unsafe or unjudged: 3),"
        " fewer than data.n_samples 3: lower it, loosen data.filters, or give a larger table."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [0, 2])
def test_too_few_rows_without_any_dropped(tmp_path, rows):
    path = table(tmp_path / "t.parquet", URL=pa.array(urls(rows), pa.string()))
    with pytest.raises(DgmrError, match=f"only {rows} of {rows} rows of .* fewer than .* 3"):
        select(path, config(3), tmp_path / "out")


def test_no_table_is_told(tmp_path):
    with pytest.raises(DgmrError, match="data.table: no file matches"):
        select(f"{tmp_path}/*.parquet", config(), tmp_path / "out")


def test_counts_are_returned_and_written(tmp_path):
    path = table(tmp_path / "t.parquet", URL=urls(5))
    counts = select(path, config(3), tmp_path / "out")
    assert counts == {"rows": 5, "selected": 3, "url not http": 0}
    assert json.loads((tmp_path / "out" / "selection.json").read_text()) == counts


def test_selection_replaces_the_one_before(tmp_path):
    path = table(tmp_path / "t.parquet", URL=urls(30))
    select(path, config(30), tmp_path / "out")
    select(path, config(5), tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["00000.parquet", "selection.json"]
