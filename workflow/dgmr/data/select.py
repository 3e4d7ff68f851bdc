"""Filter a table and draw ``n_samples`` of its rows at random, in one pass and little memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dgmr.data import tables
from dgmr.errors import DgmrError
from dgmr.files import replaced, replaced_folder, write_json
from dgmr.params import Data, Filters

_BATCH_ROWS = 65_536
_SCHEME = r"^(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*:)"


def select(table: str, config: Data, output: Path) -> dict[str, int]:
    """Draw the samples of ``table`` (a path or glob) and deal them to shards.

    Writes ``output/<job>.parquet`` for each job of ``config.jobs`` with the columns ``sample_key``
    (the row's number in the table), ``shard``, ``url``, ``caption`` and what else the table says of
    them, and ``output/selection.json``. A row's place in the draw depends on the seed and its number alone.

    Returns:
        Rows of the table by what became of them: ``rows``, ``selected``, and a reason for each drop.

    Raises:
        DgmrError: the table lacks a column, or too few of its rows pass the filters.
    """
    random = np.random.default_rng(config.seed)
    counts: dict[str, int] = {"rows": 0}
    kept = pa.table({"row": pa.array([], pa.int64()), "rank": pa.array([], pa.float64())})
    for path in tables.find(table):
        names = tables.columns(path, config.filters)
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(names.values())):
            rows = pa.table({ours: batch[theirs] for ours, theirs in names.items()})
            start = counts["rows"]
            counts["rows"] += len(rows)
            rows = rows.append_column("row", pa.array(np.arange(start, counts["rows"])))
            rows = rows.append_column("rank", pa.array(random.random(len(rows))))
            passing = rows.filter(pa.array(_passes(rows, config, counts)))
            kept = pa.concat_tables([kept, passing], promote_options="permissive")
            if len(kept) > config.n_samples + 4 * _BATCH_ROWS:
                kept = _lowest(kept, config.n_samples)
    if len(kept) < config.n_samples:
        dropped = ", ".join(f"{reason}: {n}" for reason, n in counts.items() if reason != "rows")
        raise DgmrError(
            f"data.table: only {len(kept)} of {counts['rows']} rows of {table} pass"
            f" ({dropped or 'nothing dropped'}), fewer than data.n_samples {config.n_samples}:"
            " lower it, loosen data.filters, or give a larger table."
        )
    counts["selected"] = config.n_samples
    _write(_lowest(kept, config.n_samples), config, counts, output)
    return counts


def _lowest(rows: pa.Table, count: int) -> pa.Table:
    return rows.take(pc.sort_indices(rows, [("rank", "ascending"), ("row", "ascending")])[:count])


def _write(rows: pa.Table, config: Data, counts: dict[str, int], output: Path) -> None:
    shard_of_row = np.repeat(config.shards, config.shard_size)[: len(rows)]
    keys = pa.array([f"{row:09d}" for row in rows["row"].to_pylist()])
    rows = rows.drop_columns(["row", "rank"])
    rows = rows.add_column(0, "shard", pa.array(shard_of_row)).add_column(0, "sample_key", keys)
    if "caption" not in rows.column_names:
        rows = rows.append_column("caption", pa.nulls(len(rows), pa.string()))
    size = config.shard_size * config.shards_per_job
    with replaced_folder(output) as folder:
        for position, job in enumerate(config.jobs):
            with replaced(folder / f"{job}.parquet") as partial:
                pq.write_table(rows.slice(position * size, size), partial)
        write_json(folder / "selection.json", counts)


def _passes(rows: pa.Table, config: Data, counts: dict[str, int]) -> NDArray[np.bool_]:
    """Which rows pass, ``[rows]``; adds the others to ``counts`` by their first reason."""
    passing = np.ones(len(rows), dtype=bool)
    for reason, fails in _failures(rows, config.filters, config.urls).items():
        dropped = passing & fails
        counts[reason] = counts.get(reason, 0) + int(dropped.sum())
        passing &= ~fails
    return passing


def _failures(rows: pa.Table, filters: Filters, urls: str) -> dict[str, NDArray[np.bool_]]:
    """For each filter in use, the rows that fail it; what the table does not say (null) fails."""
    failures = {f"url not {urls}": ~_url_allowed(rows["url"], urls)}
    if filters.min_side is not None:
        shorter = np.minimum(_floats(rows["width"]), _floats(rows["height"]))
        failures["too small"] = ~(shorter >= filters.min_side)
    if filters.max_aspect_ratio is not None:
        width, height = _floats(rows["width"]), _floats(rows["height"])
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.maximum(width / height, height / width)
        failures["too elongated"] = ~(ratio <= filters.max_aspect_ratio)
    if filters.min_similarity is not None:
        failures["too dissimilar"] = ~(_floats(rows["similarity"]) >= filters.min_similarity)
    if filters.max_punsafe is not None:
        failures["unsafe or unjudged"] = ~_safe(rows, filters.max_punsafe)
    return failures


def _safe(rows: pa.Table, max_punsafe: float) -> NDArray[np.bool_]:
    """By the score where the table has one, else by LAION-400M's tag."""
    if "punsafe" in rows.column_names:
        return _floats(rows["punsafe"]) <= max_punsafe
    return _booleans(pc.equal(pc.utf8_upper(pc.cast(rows["nsfw"], pa.string())), "UNLIKELY"))


def _url_allowed(urls: Any, kind: str) -> NDArray[np.bool_]:
    """``http``: http(s) URLs. ``file``: file URLs, and paths relative to the table."""
    schemes = pc.utf8_lower(pc.struct_field(pc.extract_regex(urls, _SCHEME), "scheme"))
    if kind == "http":
        return _booleans(pc.is_in(schemes, pa.array(["http:", "https:"])))
    relative = pc.and_(pc.is_null(schemes), pc.is_valid(urls))
    return _booleans(pc.or_kleene(pc.equal(schemes, "file:"), relative))


def _floats(column: Any) -> NDArray[np.float64]:
    values: NDArray[np.float64] = pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _booleans(column: Any) -> NDArray[np.bool_]:
    values: NDArray[np.bool_] = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
    return values.astype(bool)
