"""Gather the jobs' shards into ``results/data``, with the manifest, the ledger and the metrics."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dgmr.data.pack import LEDGER, SHARDS
from dgmr.errors import DgmrError
from dgmr.files import read_json, replaced_folder, write_json
from dgmr.shards import MANIFEST, Shard, link_shard, write_manifest

METRICS = "metrics.json"


def publish(jobs: list[Path], selection: Path, output: Path) -> None:
    """Link the shards of ``jobs`` into ``output``, which holds nothing else then.

    Raises:
        DgmrError: not one image of the table could be had.
    """
    ledger = pa.concat_tables([pq.read_table(job / LEDGER) for job in jobs])
    reasons = Counter(status.split(":")[0] for status in ledger["status"].to_pylist())
    if not reasons["ok"]:
        raise DgmrError(
            f"none of the {len(ledger)} images of data.table could be had ({dict(reasons)}):"
            f" {jobs[0] / LEDGER} and its like say why for each; check the URLs and data.download."
        )
    shards = [(job, Shard(**entry)) for job in jobs for entry in read_json(job / SHARDS)]
    with replaced_folder(output) as partial:
        for job, shard in shards:
            link_shard(job, partial, shard.name)
        pq.write_table(ledger, partial / LEDGER)
        write_json(
            partial / METRICS,
            {"samples": reasons["ok"], "table": read_json(selection), "images": dict(reasons)},
        )
        write_manifest(partial, [shard for _, shard in shards])


def publish_evaluation(evaluation: Path, output: Path) -> None:
    """Link the ``evaluation`` shards into ``output``, which holds nothing else then."""
    manifest = read_json(evaluation / MANIFEST)
    with replaced_folder(output) as partial:
        for entry in manifest["shards"]:
            link_shard(evaluation, partial, entry["name"])
        write_json(partial / MANIFEST, manifest)
