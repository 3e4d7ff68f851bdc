"""Tell the MLflow store what the rooms' files say: the files are the truth, the store a copy.

::

    params.mlflow.experiment
      chain <key of the params>    params, params.yaml, the report's metrics
        teacher                    its section of the params, what its files say
        data                       ... a run for each room

A FINISHED run is complete; any other is what a killed job left, and is written anew. So to tell the
store again, from several jobs at once or after a crash comes to the same as telling it once.
No failure of the store fails the chain: it ends in one warning.
"""

import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import yaml
from filelock import FileLock

import dgmr
from dgmr.errors import DgmrError
from dgmr.files import read_json, sha256
from dgmr.fingerprint import key
from dgmr.params import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK = Path("work/track.lock")
_LOCK_TIMEOUT_S = 300.0
_MODEL_ROOMS = ("teacher", "prune", "distill")
# Unless the user sets them: give up in seconds, not minutes; tell nobody else; be quiet.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Point(NamedTuple):
    """One value of a metric and its place on the metric's curve."""

    metric: str
    value: float
    step: int = 0


@dataclass(frozen=True)
class Account:
    """What the files of a room say."""

    artefact: str
    """Hash; another one means that the room was made anew and differs."""
    written_ms: int
    """When the files were written, milliseconds since 1970."""
    params: dict[str, Any]
    points: list[Point]
    attachments: list[Path]


def rooms(params: Params) -> list[str]:
    """Names of the rooms, in the order of the chain."""
    stages = [f"distill/{name}" for name in params.distill.stages]
    return ["teacher", "data", "features", "prune", *stages, "evaluate", "report"]


def track(room: str, params: Params, results: Path) -> bool:
    """Tell the store what the files of ``room`` under ``results`` say; whether it knows it now.

    Raises:
        DgmrError: there is no such room, or it is not done.
    """
    if room not in rooms(params):
        raise DgmrError(f"{room} is no room; choose one of {', '.join(rooms(params))}.")
    account = _read(room, params, results)
    if account is None:
        raise DgmrError(f"{room} cannot be tracked: its files are not under {results} yet.")
    return _tell(params, {room: account})[room]


def sync(params: Params, results: Path) -> dict[str, bool]:
    """As :func:`track`, for every room that is done."""
    accounts = {room: _read(room, params, results) for room in rooms(params)}
    return _tell(params, {room: found for room, found in accounts.items() if found is not None})


def _read(room: str, params: Params, results: Path) -> Account | None:
    """What the room's files say; None while any is missing."""
    kind, _, stage = room.partition("/")
    models = ["teacher", "pruned", *params.distill.stages]
    names = {
        "teacher": ["teacher/provenance.json"],
        "data": ["data/metrics.json"],
        "features": ["features/metrics.json"],
        "prune": ["prune/provenance.json", "prune/blocks.json"],
        "distill": [f"{room}/provenance.json", f"{room}/history.json"],
        "evaluate": [f"evaluate/{name}.json" for name in [*models, "speed"]],
        "report": ["metrics.json", "report.html"],
    }
    paths = [results / name for name in names[kind]]
    if not all(path.is_file() for path in paths):
        return None
    said = {path.stem: read_json(path) for path in paths if path.suffix == ".json"}
    section = params.distill.stages[stage] if stage else getattr(params, kind, None)
    # One level deep: widths, the stage's config and speeds are told elsewhere.
    about = {
        f"{stem}.{name}": value
        for stem in ("provenance", "speed")
        for name, value in said.get(stem, {}).items()
        if not isinstance(value, dict)
    }
    return Account(
        said["provenance"]["sha256"] if kind in _MODEL_ROOMS else key(*map(sha256, paths)),
        max(path.stat().st_mtime_ns for path in paths) // 1_000_000,
        _flat(section.model_dump(mode="json") if section else {}) | about,
        _points(kind, said),
        [path for path in paths if path.suffix != ".json"],
    )


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
            points = [p for row in said["history"] for p in _numbers(row, row["samples"])]
            return [point for point in points if point.metric not in ("step", "samples")]
        case "evaluate":
            speed_of = said["speed"]["images_per_s"]
            models = {name: content for name, content in said.items() if name != "speed"}
            return _numbers({n: m | {"images_per_s": speed_of[n]} for n, m in models.items()})
        case _:
            return _numbers(said["metrics"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted names, in characters and lengths that MLflow takes."""
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        dotted = prefix + re.sub(r"[^\w. :-]", "_", str(name))
        leaves |= _flat(value, f"{dotted}.") if isinstance(value, dict) else {dotted[:250]: value}
    return leaves


def _numbers(values: dict[str, Any], step: int = 0) -> list[Point]:
    flat = _flat(values).items()
    return [Point(name, value, step) for name, value in flat if type(value) in (int, float)]


def _tell(params: Params, accounts: dict[str, Account]) -> dict[str, bool]:
    """Tell the store of these rooms; which of them it knows now."""
    known = dict.fromkeys(accounts, False)
    uri = params.mlflow.tracking_uri
    if uri is None or not accounts:
        return known
    try:
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(LOCK, timeout=_LOCK_TIMEOUT_S):  # MLflow has no "create unless it is there"
            chain = _Chain(uri, params)
            for room, account in accounts.items():
                chain.tell(room, account)
                known[room] = True
    except Exception as error:
        # Stores, their drivers and the network raise all sorts of errors, and none may fail a job
        # whose results are there. Our own files have been read by now.
        missing = ", ".join(room for room, is_known in known.items() if not is_known)
        text = f"{uri} could not be told of {missing}: {type(error).__name__}: {error}"
        text = textwrap.shorten(re.sub(r"//[^/\s]*@", "//***@", text), 600)  # without passwords
        print(f"Warning: MLflow store {text} (the results are not affected)", file=sys.stderr)
    return known


class _Chain:
    """The run that stands for the whole chain with these params; it is made where there is none."""

    def __init__(self, uri: str, params: Params) -> None:
        self.client, artifacts = _connect(uri)
        self.code = _code_tags()
        name = params.mlflow.experiment
        found = self.client.get_experiment_by_name(name)
        self.experiment: str = (
            found.experiment_id if found else self.client.create_experiment(name, artifacts)
        )
        # Without where to log: it changes no result, and a URI may hold a password.
        resolved = params.shaping()
        tag = {"dgmr.params_key": key(resolved)}
        run = next(iter(self._runs(tag)), None) or self.client.create_run(
            self.experiment, tags=tag | self.code, run_name=f"chain {key(resolved)}"
        )
        self.run: str = run.info.run_id
        if run.info.status != "FINISHED":
            self.client.log_batch(self.run, params=_as_params(_flat(resolved)))
            self.client.log_text(self.run, yaml.safe_dump(resolved, sort_keys=False), "params.yaml")
            self.client.set_terminated(self.run)

    def tell(self, room: str, account: Account) -> None:
        """Leave the chain with one run of ``room``, FINISHED, that says what ``account`` does."""
        tags = {"mlflow.parentRunId": self.run, "dgmr.room": room}
        is_told = False
        for run in self._runs(tags):
            is_this = run.data.tags.get("dgmr.artefact") == account.artefact
            if run.info.status == "FINISHED" and is_this and not is_told:
                is_told = True
            else:  # left by a killed job, or of what the room made before
                self.client.delete_run(run.info.run_id)
        if is_told:
            return
        tags |= {"dgmr.artefact": account.artefact} | self.code
        child = self.client.create_run(self.experiment, tags=tags, run_name=room).info.run_id
        metrics = _as_metrics(account)
        self.client.log_batch(child, metrics, _as_params(account.params))
        for path in account.attachments:
            self.client.log_artifact(child, str(path))
        # The chain's code is that of its latest room, its metrics (to compare chains) the report's.
        for name, value in self.code.items():
            self.client.set_tag(self.run, name, value)
        self.client.log_batch(self.run, metrics if room == "report" else [])
        self.client.set_terminated(self.run)  # again, for the time
        self.client.set_terminated(child)  # last: it says that all of the above is done

    def _runs(self, tags: dict[str, str]) -> list[Any]:
        """The experiment's runs with these tags, oldest first; without deleted ones."""
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        return self.client.search_runs(
            [self.experiment], wanted, order_by=["attributes.start_time ASC"]
        )


def _connect(uri: str) -> tuple["MlflowClient", str | None]:
    """A client of the store, and where a new experiment's artifacts go; None: the store decides."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from sqlalchemy import create_engine, make_url

    for name in ("mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our one warning says it
    artifacts = None
    if urlsplit(uri).scheme.partition("+")[0] in DATABASE_ENGINES:
        url = make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database:
            # Absolute, so that `mlflow ui` finds them wherever it is started.
            folder = Path(url.database).absolute().parent
            folder.mkdir(parents=True, exist_ok=True)
            artifacts = (folder / "mlartifacts").as_uri()
        with create_engine(url).connect():
            pass  # MLflow would take minutes to give up
    return MlflowClient(tracking_uri=uri), artifacts


def _as_params(values: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in values.items()]


def _as_metrics(account: Account) -> list[Any]:
    """With the files' time, so that a point told twice is one point."""
    from mlflow.entities import Metric

    return [Metric(p.metric, p.value, account.written_ms, p.step) for p in account.points]


def _code_tags() -> dict[str, str]:
    """Version and commit of this package, as far as they are known."""
    tags = {"dgmr.version": getattr(dgmr, "__version__", "unknown")}
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", ".")
    if commit is not None and changes is not None:
        tags["mlflow.source.git.commit"] = commit
        tags["dgmr.git_dirty"] = str(bool(changes)).lower()
    return tags


def _git(*arguments: str) -> str | None:
    """What git says in the workflow's folder; None where it cannot."""
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
