"""Gather the jobs' shards into ``results/data``, with the manifest, the ledger and the metrics."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dgmr.data.pack import LEDGER, SHARDS
from dgmr.errors import DgmrError
from dgmr.files import read_json, replaced_files, write_json
from dgmr.shards import MANIFEST, Shard, link_shard, write_manifest

METRICS = "metrics.json"


def publish(jobs: list[Path], selection: Path, output: Path) -> None:
    """Link the shards of ``jobs`` into ``output``; the manifest comes last.

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
    about = {"samples": reasons["ok"], "table": read_json(selection), "images": dict(reasons)}
    with replaced_files(output, MANIFEST) as folder:
        pq.write_table(ledger, folder / LEDGER)
        for job, shard in shards:
            link_shard(job, folder, shard.name)
        write_json(folder / METRICS, about)
        write_manifest(folder, [shard for _, shard in shards])


def publish_evaluation(evaluation: Path, output: Path) -> None:
    """Link the ``evaluation`` shards into ``output``; the manifest comes last."""
    manifest = read_json(evaluation / MANIFEST)
    with replaced_files(output, MANIFEST) as folder:
        for entry in manifest["shards"]:
            link_shard(evaluation, folder, entry["name"])
        write_json(folder / MANIFEST, manifest)
