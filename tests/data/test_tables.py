"""LAION's columns, however a release spells them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dgmr.data import tables
from dgmr.errors import DgmrError
from dgmr.params import Filters

ANY = Filters(max_punsafe=None)
ALL = Filters(min_side=1, max_aspect_ratio=2, min_similarity=0.1, max_punsafe=0.5)


def table(folder, *names):
    path = folder / "t.parquet"
    pq.write_table(pa.table({name: pa.array([None], pa.string()) for name in names}), path)
    return path


LAION = {
    "400m": "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE NSFW similarity",
    "2b-en": "SAMPLE_ID URL TEXT HEIGHT WIDTH LICENSE LANGUAGE NSFW similarity",
    "2b-en-joined": "URL TEXT WIDTH HEIGHT similarity punsafe pwatermark AESTHETIC_SCORE hash md5",
    "re-laion": "url caption original_width original_height similarity punsafe",
    "datacomp": "url text original_width original_height clip_similarity NSFW",
}


@pytest.mark.parametrize("release", LAION)
def test_releases_are_understood(tmp_path, release):
    names = LAION[release].split()
    found = tables.columns(table(tmp_path, *names), ALL)
    assert set(found.values()) <= set(names)
    assert {"url", "caption", "width", "height", "similarity"} <= set(found)
    assert ("punsafe" in found) == ("punsafe" in names)
    assert ("nsfw" in found) == ("NSFW" in names)


def test_own_names_of_columns_are_kept(tmp_path):
    found = tables.columns(table(tmp_path, "Url", "ALT_TEXT", "extra"), ANY)
    assert found == {"url": "Url", "caption": "ALT_TEXT"}


def test_first_spelling_is_preferred(tmp_path):
    found = tables.columns(
        table(tmp_path, "caption", "original_width", "URL", "TEXT", "width"), ANY
    )
    assert found == {"url": "URL", "caption": "TEXT", "width": "width"}


@pytest.mark.parametrize(
    ("names", "filters", "says"),
    [
        (["link", "TEXT"], {}, "has no column url (needed to find the images); it has link, TEXT."),
        (["URL", "HEIGHT"], {"min_side": 64}, "no column width (needed by data.filters.min_side"),
        (["URL", "WIDTH"], {"max_aspect_ratio": 2}, "no column height (needed by data.filters.min"),
        (["URL"], {"min_similarity": 0.3}, "no column similarity (needed by data.filters.min_sim"),
        (["URL"], {"max_punsafe": 0.5}, "no column punsafe or nsfw (needed by data.filters.max_p"),
    ],
)
def test_missing_column_is_named(tmp_path, names, filters, says):
    path = table(tmp_path, *names)
    with pytest.raises(DgmrError) as error:
        tables.columns(path, Filters(**({"max_punsafe": None} | filters)))
    assert str(error.value).startswith(f"data.table: {path} ") and says in str(error.value)
    tables.columns(table(tmp_path, "URL"), ANY)  # without the filter it isn't missed


@pytest.mark.parametrize("content", [b"", b"URL,TEXT\nhttp://a,b\n", b"PAR1 and no more"])
def test_unreadable_table_is_named(tmp_path, content):
    path = tmp_path / "t.parquet"
    path.write_bytes(content)
    with pytest.raises(DgmrError, match=r"t\.parquet cannot be read as Parquet"):
        tables.columns(path, ANY)


def test_folder_is_no_table(tmp_path):
    with pytest.raises(DgmrError, match="cannot be read as Parquet"):
        tables.columns(tmp_path, ANY)


def test_files_are_found_sorted(tmp_path):
    for name in ("b.parquet", "a.parquet", "deep/er/c.parquet", "a.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def find(pattern):
        return [str(path.relative_to(tmp_path)) for path in tables.find(f"{tmp_path}/{pattern}")]

    assert find("a.parquet") == ["a.parquet"]
    assert find("*.parquet") == ["a.parquet", "b.parquet"]
    assert find("**/*.parquet") == ["a.parquet", "b.parquet", "deep/er/c.parquet"]


@pytest.mark.parametrize("key", ["data.table", "data.eval.path"])
def test_nothing_found_is_told(tmp_path, key):
    pattern = f"{tmp_path}/*.parquet"
    with pytest.raises(DgmrError) as error:
        tables.find(pattern, key)
    assert str(error.value) == f"{key}: no file matches {pattern}."
