"""The flat metrics and curves of a finished chain, from its saved files and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgmr import artefact
from dgmr.errors import DgmrError
from dgmr.files import read_json

TEACHER, PRUNED, STUDENT = "teacher", "pruned", "student"
MODEL_METRICS = (
    "top1",
    "top5",
    "feature_mse",
    "cosine",
    "same_top1",
    "params",
    "flops",
    "images_per_s",
)
_CURVE = ("step", "samples", "lr", "loss", "pooled", "patch_tokens", "blocks")

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What the rooms saved, each part checked to be about the same weights."""

    folders: dict[str, Path]
    """Artefacts by model: teacher, pruned, then the stages in order."""
    provenance: dict[str, Row]
    """By model."""
    models: dict[str, Row]
    """By model: its evaluation, and ``images_per_s``."""
    histories: dict[str, list[Row]]
    """By stage."""
    speed: Row
    """How speed was measured."""
    blocks: dict[str, Row]
    """By MLP, in the order of the network."""
    data: Row

    @property
    def last_stage(self) -> str:
        """The model that is the student."""
        return list(self.folders)[-1]


def read(results: Path, stages: list[str], shared: Path) -> Results:
    """The saved files of the chain teacher, pruned, ``stages`` in the folder ``results``.

    Teacher and data are in ``shared``, which is ``results`` itself but for a point of a sweep.

    Raises:
        DgmrError: a file is missing, or is about other weights than those that are there.
    """
    folders = {TEACHER: shared / "teacher", PRUNED: results / "prune"}
    folders |= {stage: results / "distill" / stage for stage in stages}
    provenance = {model: artefact.provenance(folder) for model, folder in folders.items()}
    _check_chain(folders, provenance)
    speed_file = results / "evaluate" / "speed.json"
    speed = load(speed_file)
    models = {}
    for model in folders:
        file = results / "evaluate" / f"{model}.json"
        evaluation = load(file)
        _check_weights(file, evaluation["sha256"], folders[model], provenance[model])
        _check_weights(file, evaluation["teacher_sha256"], folders[TEACHER], provenance[TEACHER])
        _check_weights(speed_file, speed["sha256"].get(model), folders[model], provenance[model])
        models[model] = evaluation | {"images_per_s": speed["images_per_s"][model]}
    return Results(
        folders=folders,
        provenance=provenance,
        models=models,
        histories={stage: load(folders[stage] / "history.json") for stage in stages},
        speed=speed,
        blocks=load(folders[PRUNED] / "blocks.json"),
        data=load(shared / "data" / "metrics.json"),
    )


def flat(results: Results) -> dict[str, float]:
    """``<model>.<metric>`` of every model and of ``student``, the last stage's; what was saved.

    Accuracies are in percent, ``reduction.*`` fractions of the teacher's that are gone,
    ``speedup.images_per_s`` the ratio to the teacher's; ``distill.skipped_steps`` those of all stages
    whose loss or gradient was no finite number.
    """
    teacher, student = results.models[TEACHER], results.models[results.last_stage]
    found = {
        f"{name}.{metric}": values[metric]
        for name, values in (results.models | {STUDENT: student}).items()
        for metric in MODEL_METRICS
        if metric in values
    }
    for metric in ("params", "flops"):
        found[f"reduction.{metric}"] = 1 - student[metric] / teacher[metric]
    found["distill.skipped_steps"] = sum(
        results.provenance[stage]["skipped_steps"] for stage in results.histories
    )
    found["speedup.images_per_s"] = student["images_per_s"] / teacher["images_per_s"]
    return found


def curves(results: Results) -> list[Row]:
    """The histories as one list of rows, their ``samples`` counted over all stages."""
    rows: list[Row] = []
    for stage, history in results.histories.items():
        before = rows[-1]["samples"] if rows else 0
        for row in history:
            kept = {name: row[name] for name in _CURVE if name in row}
            rows.append({"stage": stage, **kept, "samples": before + row["samples"]})
    return rows


def _check_weights(file: Path, sha256: str | None, folder: Path, provenance: Row) -> None:
    """Refuse a measurement of other weights than the artefact's."""
    if sha256 != provenance["sha256"]:
        raise DgmrError(
            f"{file} is about other weights than those in {folder}:"
            " run snakemake again, so that they are evaluated."
        )


def _check_chain(folders: dict[str, Path], provenance: dict[str, Row]) -> None:
    """Refuse a model that was made from another than the one before it."""
    for parent, child in zip(list(folders), list(folders)[1:], strict=False):
        made_from = provenance[child]["parent_sha256"]
        pruned_again = folders[child].parent / "pruned" / child
        if made_from != provenance[parent]["sha256"] and pruned_again.is_dir():
            between = artefact.provenance(pruned_again)
            if between["sha256"] == made_from:
                made_from = between["parent_sha256"]
        if made_from != provenance[parent]["sha256"]:
            raise DgmrError(
                f"{folders[child]} was not made from the weights in {folders[parent]}:"
                " run snakemake again, so that it is remade."
            )


def load(file: Path) -> Any:
    """What a JSON file of a run says.

    Raises:
        DgmrError: it is missing.
    """
    if not file.is_file():
        raise DgmrError(f"{file} is missing: run snakemake again, it makes what is missing.")
    return read_json(file)
