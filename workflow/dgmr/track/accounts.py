"""What the files of the rooms say, as MLflow shall say it; nothing here knows MLflow."""

import contextlib
import csv
import itertools
import os
import re
import socket
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from dgmr.files import read_json, sha256
from dgmr.fingerprint import key
from dgmr.keys import Keys
from dgmr.params import Params

BENCHMARKS = Path("work/benchmark")
RUNS = Path("work/distill")
DVC_LOCK = Path("dvc.lock")
STALE_S = 600.0
"""Seconds after which a stage that says nothing is taken for dead; it writes every few seconds."""
_MODEL_ROOMS = ("teacher", "prune", "distill")


class Room(NamedTuple):
    """A room of a run, by the name that MLflow knows it by: ``prune``, or ``distill/<stage>``."""

    name: str
    keys: Keys
    results: Path
    """Of the run: those of a point lie in its own folder."""
    point: str = ""
    """Of the run's sweep; empty for the run itself."""

    def __str__(self) -> str:
        return f"sweep/{self.point}/{self.name}" if self.point else self.name

    @property
    def kind(self) -> str:
        """The name, without the stage."""
        return self.name.partition("/")[0]

    @property
    def stage(self) -> str:
        """Empty but for a stage's room."""
        return self.name.partition("/")[2]

    @property
    def is_done(self) -> bool:
        """Whether what is there is what these params give, not others."""
        return all((self.results / stamp).is_file() for stamp in self.keys.stamps(self.name))


class Point(NamedTuple):
    """One value of a metric and its place on the metric's curve."""

    metric: str
    value: float
    step: int = 0
    after_ms: int = 0
    """Milliseconds of training before it."""


@dataclass(frozen=True)
class Account:
    """What the files of a room say."""

    status: Literal["FINISHED", "RUNNING", "KILLED"]
    artefact: str | None
    """Hash; another one means that the room was made anew and differs. None while it is made."""
    written_ms: int
    """When the files were written, milliseconds since 1970."""
    seconds: float
    """How long it took, as far as is known."""
    params: dict[str, Any]
    points: list[Point]
    tags: dict[str, str] = field(default_factory=dict)
    attachments: list[Path] = field(default_factory=list)
    student: Path | None = None
    """The artefact to be logged as a model."""


def rooms(keys: Keys, results: Path, point: str = "") -> list[Room]:
    """The rooms of a run, in the order of the chain; a point has none of those before the pruning."""
    stages = [f"distill/{name}" for name in keys.params.distill.stages]
    names = ["teacher", "data", "features"] * (not point)
    names += ["prune", *stages, "evaluate", "report"]
    return [Room(name, keys, results, point) for name in names]


def all_rooms(params: Params, results: Path) -> list[Room]:
    """The rooms of the run, and of the points of its sweep."""
    keys = Keys(params)
    found = rooms(keys, results)
    for point, its_keys in keys.points.items():
        found += rooms(its_keys, results / "sweep" / point, point)
    return found


def look(room: Room) -> Account | None:
    """What the files of a room say: one that is done, or a stage that trains or was killed."""
    return (read(room) if room.is_done else None) or read_live(room)


def read(room: Room) -> Account | None:
    """What the files of a room say that is done, with whatever params; None while any is missing."""
    kind, results = room.kind, room.results
    names = {
        "teacher": ["teacher/provenance.json"],
        "data": ["data/metrics.json"],
        "features": ["features/metrics.json"],
        "prune": ["prune/provenance.json", "prune/blocks.json"],
        "distill": [f"{room.name}/provenance.json", f"{room.name}/history.json"],
        "evaluate": [f"evaluate/{name}.json" for name in [*room.keys.models, "speed"]],
        "report": ["metrics.json", "report.html", "student/provenance.json"],
    }
    paths = [results / name for name in names[kind]]
    if not all(path.is_file() for path in paths):
        return None
    said = {path.stem: read_json(path) for path in paths if path.suffix == ".json"}
    # One level deep: widths, the stage's config and speeds are told elsewhere.
    about = {
        f"{stem}.{name}": value
        for stem in ("provenance", "speed")
        for name, value in said.get(stem, {}).items()
        if not isinstance(value, dict)
    }
    system = _system(room)
    points = _points(kind, said)
    trained = max((point.after_ms for point in points), default=0) / 1000
    jobs = next((point.value for point in system if point.metric == "system/s"), 0.0)
    found = _live_file(room)
    return Account(
        "FINISHED",
        said["provenance"]["sha256"] if kind in _MODEL_ROOMS else key(*map(sha256, paths)),
        max(_modified_ms(path) for path in paths),
        trained or jobs,
        _section(room) | about,
        points + system,
        _dvc_tags(kind, results) | (_live_tags(found[1], found[1]["steps"]) if found else {}),
        [path for path in paths if path.suffix == ".html"],
        results / "student" if kind == "report" else None,
    )


def read_live(room: Room) -> Account | None:
    """What a stage wrote that trains, or was killed as it did; None of other rooms.

    A row may be told as soon as it is there, for a run that was killed comes to the same losses again;
    how fast it was is told once it is in a checkpoint, for that is measured anew.
    """
    if (found := _live_file(room)) is None:
        return None
    path, live = found
    saved = max(
        (int(folder.name[-8:]) for folder in path.parent.glob("step-" + "?" * 8)), default=0
    )
    steps_at = {row["samples"]: row["step"] for row in live["rows"]}
    points = _points(room.kind, {"history": live["rows"]})
    return Account(
        "RUNNING" if _is_alive(path, live) else "KILLED",
        None,
        _modified_ms(path),
        max((point.after_ms for point in points), default=0) / 1000,
        _section(room),
        [p for p in points if p.metric != "images_per_s" or steps_at[p.step] <= saved],
        _live_tags(live, live["step"]),
    )


def _live_tags(live: dict[str, Any], step: int) -> dict[str, str]:
    note = f"step {step:,} of {live['steps']:,}"
    return {"dgmr.host": live["host"], "mlflow.note.content": note}


def _section(room: Room) -> dict[str, Any]:
    """The room's part of the params, flat."""
    params = room.keys.params
    section = params.distill.stages[room.stage] if room.stage else getattr(params, room.kind, None)
    return flat(section.model_dump(mode="json") if section else {})


def _points(kind: str, said: dict[str, Any]) -> list[Point]:
    """The metrics in what the room's files, by their stems, ``said``."""
    match kind:
        case "teacher":
            return []
        case "prune":
            rows = enumerate(said["blocks"].values())
            points = [point for step, row in rows for point in _numbers(row, step)]
            by_name = itertools.groupby(sorted(points), key=lambda point: point.metric)
            means = {name: statistics.fmean(p.value for p in group) for name, group in by_name}
            return points + [Point(f"{name}.mean", mean) for name, mean in means.items()]
        case "distill":
            return _curves(said["history"])
        case "evaluate":
            speed_of = said["speed"]["images_per_s"]
            models = {name: content for name, content in said.items() if name != "speed"}
            return _numbers({n: m | {"images_per_s": speed_of[n]} for n, m in models.items()})
        case _:
            return _numbers(said["metrics"])


def _curves(history: list[dict[str, Any]]) -> list[Point]:
    """Over samples, and over the seconds of training that the rows themselves account for."""
    points: list[Point] = []
    samples, seconds = 0, 0.0
    for row in history:
        if speed := row.get("images_per_s"):
            seconds += (row["samples"] - samples) / speed
        samples = row["samples"]
        values = {name: value for name, value in row.items() if name not in ("step", "samples")}
        points += _numbers(values, samples, int(1000 * seconds))
    return points


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted names, in characters and lengths that MLflow takes."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        dotted = prefix + re.sub(r"[^\w. :-]", "_", str(name))
        leaves |= flat(value, f"{dotted}.") if isinstance(value, dict) else {dotted[:250]: value}
    return leaves


def _numbers(values: dict[str, Any], step: int = 0, after_ms: int = 0) -> list[Point]:
    return [
        Point(name, value, step, after_ms)
        for name, value in flat(values).items()
        if type(value) in (int, float)
    ]


def _benchmarks(room: Room) -> Iterator[Path]:
    """What Snakemake measured of the room's jobs: ``work/benchmark/<rule>/<key>/<wildcards>.tsv``."""
    keys, stage, results = room.keys, room.stage, room.results
    places: list[str] = []
    match room.kind:
        case "features":
            places = [f"targets/{keys.targets}", f"calibration/{keys.calibration}"]
        case "prune":
            places = [f"saliency/{keys.saliency}", f"order_blocks/{keys.orders}"]
            places += [f"refit_blocks/{keys.refits}"]
        case "distill":
            places = [f"distill_stage/{keys.distill(stage)}/{results}"]
            if keys.params.distill.stages[stage].prune is not None:
                places += [f"prune_again/{keys.prune_again(stage)}/{results}"]
        case "evaluate":
            places = [f"evaluate_model/{keys.evaluation(model)}" for model in keys.models]
    for place in places:
        yield from sorted((BENCHMARKS / place).rglob("*.tsv"))


def _system(room: Room) -> list[Point]:
    """``system/<column>`` of what Snakemake measured of the room's jobs, in its columns' units.

    Seconds (``s``, ``cpu_time``) and megabytes read and written are sums over the jobs, memory is the
    largest job's, ``mean_load`` the mean over the jobs' seconds.
    """
    jobs: list[dict[str, float]] = []
    for path in _benchmarks(room):
        with path.open(newline="") as file:
            jobs += [_measured(row) for row in csv.DictReader(file, delimiter="\t")]
    found: dict[str, float] = {}
    for column in sorted({column for job in jobs for column in job}):
        values = [job[column] for job in jobs if column in job]
        if column.startswith("max_"):
            found[column] = max(values)
        elif column == "mean_load":
            seconds = [job["s"] for job in jobs if column in job]
            found[column] = statistics.fmean(values, seconds) if any(seconds) else max(values)
        else:
            found[column] = sum(values)
    return [Point(f"system/{column}", value) for column, value in found.items()]


def _measured(row: dict[str, str]) -> dict[str, float]:
    """A job's numbers; of one that was too short some are ``-`` or ``NA``."""
    found = {}
    for column in ("s", "cpu_time", "io_in", "io_out", "mean_load", "max_rss", "max_pss"):
        with contextlib.suppress(KeyError, TypeError, ValueError):
            found[column] = float(row[column])
    return found


def _live_file(room: Room) -> tuple[Path, dict[str, Any]] | None:
    """The newest of this stage, of these params, that trains what will lie in these results."""
    if not room.stage:
        return None
    output = str((room.results / room.name).resolve())
    found = []
    for path in (RUNS / room.keys.distill(room.stage)).glob("*/live.json"):
        live = read_json(path)
        if live["output"] == output:  # runs whose stage is the same share its folder
            found.append((_modified_ms(path), path, live))
    return max(found, key=lambda file: file[0])[1:] if found else None


def _is_alive(path: Path, live: dict[str, Any]) -> bool:
    """Whether the stage's process trains: it wrote lately and, on this host, is there."""
    if time.time() - path.stat().st_mtime > STALE_S:
        return False
    if live["host"] != socket.gethostname():
        return True
    try:
        os.kill(live["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _dvc_tags(kind: str, results: Path) -> dict[str, str]:
    """``dgmr.dvc.<path>``: the hash under which DVC has what the room gave.

    As ``dvc.lock`` has it, where the sizes there are those that are here: hashing gigabytes again to be
    sure is not worth a tag.
    """
    if not DVC_LOCK.is_file():
        return {}
    lock = yaml.safe_load(DVC_LOCK.read_text()) or {}
    outs = lock.get("stages", {}).get(kind, {}).get("outs", [])
    return {
        f"dgmr.dvc.{out['path']}": out["md5"]
        for out in outs
        if "md5" in out and _is_within(Path(out["path"]), results) and _is_as_locked(out)
    }


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _is_as_locked(out: dict[str, Any]) -> bool:
    path = Path(out["path"])
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    sizes = [file.stat().st_size for file in files]
    return (sum(sizes), len(sizes)) == (out.get("size"), out.get("nfiles", 1))


def _modified_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000
