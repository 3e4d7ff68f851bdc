"""One chain in the MLflow store, made to say what the accounts of its rooms say.

Every telling may end at any line, and another one take over: a run is FINISHED when all of it is told,
and what one that is not FINISHED says is compared before more is added. Requests of a teller that was
killed may still arrive at a server later; what they leave twice, the next telling removes.
"""

import contextlib
import json
import logging
import os
import platform
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import yaml

import dgmr
from dgmr.files import alone, replaced
from dgmr.fingerprint import key, versions
from dgmr.params import Params
from dgmr.track.accounts import Account, Point, flat

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAMS_KEY, POINT, ROOM, ARTEFACT, PARENT = (
    "dgmr.params_key",
    "dgmr.point",
    "dgmr.room",
    "dgmr.artefact",
    "mlflow.parentRunId",
)
_FINISHED = "FINISHED"
Told: TypeAlias = tuple[str, float, int]
"""Metric, value and step of a point in the store."""
# Unless the user sets them: give up in seconds, not minutes; tell nobody else; be quiet.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Chain:
    """The run that stands for the whole chain with these params; it is made where there is none.

    A point of a sweep may have the params of the run itself, and is another chain, for its page differs:
    it has its name as the tag ``dgmr.point``, the run itself has none.
    """

    def __init__(self, uri: str, params: Params, point: str = "") -> None:
        self.client, artifacts = connect(uri)
        self.about = _about()
        self.experiment = self._experiment(params.mlflow.experiment, artifacts)
        # Without where to log: it changes no result, and a URI may hold a password.
        resolved = params.shaping()
        self.tags = {PARAMS_KEY: key(resolved)} | ({POINT: point} if point else {})
        runs = self._runs()
        chains = [run for run in runs if ROOM not in run.data.tags]
        run = next(iter(chains), None) or self.client.create_run(
            self.experiment,
            tags=self.tags | self.about,
            run_name=f"chain {key(resolved)} {point}".rstrip(),
        )
        self.run: Any = run
        self.id: str = run.info.run_id
        self._delete(chains[1:])
        children = [run for run in runs if ROOM in run.data.tags]
        self._delete(child for child in children if child.data.tags.get(PARENT) != self.id)
        self.children = [c for c in children if c.data.tags.get(PARENT) == self.id]
        if run.info.status != _FINISHED:
            self.client.log_batch(self.id, params=_as_params(flat(resolved)))
            self.client.log_text(self.id, yaml.safe_dump(resolved, sort_keys=False), "params.yaml")
            self.client.set_terminated(self.id)

    def tell(self, room: str, account: Account) -> None:
        """Leave the chain with one run of ``room`` that says what ``account`` does."""
        runs = [run for run in self.children if run.data.tags[ROOM] == room]
        finished = [run for run in runs if run.info.status == _FINISHED]
        unfinished = [run for run in runs if run not in finished]
        if account.status == _FINISHED:
            same = [run for run in finished if run.data.tags.get(ARTEFACT) == account.artefact]
            if same:
                self._delete(run for run in runs if run is not same[0])
                self._set_tags(same[0], account.tags)  # DVC's are known after the room is told
                self._log_student(same[0], account)  # what a killed teller may have left beside it
                return
            self._delete(finished)  # of what the room made before
        elif account.status == "KILLED" and finished and not unfinished:
            return  # it was told, though its files are gone
        run, told = self._fitting(unfinished, account) or (self._create(room, account), set())
        self._delete(other for other in unfinished if other is not run)
        self._fill(run, told, account)
        if account.status == "RUNNING":
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, "RUNNING")
        elif account.status != run.info.status:
            # Last: it says that all of the above is done.
            self.client.set_terminated(run.info.run_id, account.status, account.written_ms)

    def _create(self, room: str, account: Account) -> Any:
        return self.client.create_run(
            self.experiment,
            start_time=account.written_ms - int(1000 * account.seconds),
            tags=self.tags | {PARENT: self.id, ROOM: room} | self.about | account.tags,
            run_name=room,
        )

    def _fitting(self, runs: list[Any], account: Account) -> tuple[Any, set[Told]] | None:
        """The first run that says nothing but what the account does, and nothing twice; and its points.

        None fits where a stage was killed and, on hardware that is not exact, comes to other values.
        """
        params = {param.key: param.value for param in _as_params(account.params)}
        said = {point[:3] for point in account.points}
        is_done = account.status == _FINISHED
        last = max((point.step for point in account.points), default=0)
        for run in runs:
            told = [
                (point.key, point.value, point.step)
                for metric in run.data.metrics
                for point in self.client.get_metric_history(run.info.run_id, metric)
            ]
            # A stage that went on from a checkpoint comes to the rows behind it once more.
            ahead = {point for point in told if not is_done and point[2] > last}
            is_said = set(told) - ahead <= said and run.data.params.items() <= params.items()
            if is_said and len(told) == len(set(told)):
                return run, set(told)
        return None

    def _fill(self, run: Any, told: set[Told], account: Account) -> None:
        """Add to a run that fits what it does not say yet."""
        points = [point for point in account.points if point[:3] not in told]
        params = {k: v for k, v in account.params.items() if k not in run.data.params}
        start_ms = run.info.start_time
        self.client.log_batch(run.info.run_id, _as_metrics(points, start_ms), _as_params(params))
        self._set_tags(run, self.about | account.tags)
        if account.status != _FINISHED:
            return
        for path in account.attachments:
            self.client.log_artifact(run.info.run_id, str(path))
        self._log_student(run, account)
        if account.student is not None:
            # The chain's metrics, to compare chains, are the report's.
            ours = self.run.data.metrics
            news = [p for p in account.points if ours.get(p.metric) != p.value]
            self.client.log_batch(self.id, _as_metrics(news, account.written_ms))
        # The chain's code is that of its latest room.
        self._set_tags(self.run, self.about)
        self.client.set_terminated(self.id)  # again, for the time
        self._set_tags(run, {ARTEFACT: account.artefact or ""})

    def _log_student(self, run: Any, account: Account) -> None:
        if account.student is not None:
            from dgmr.track import student

            student.log(self.client, run, account.student, self.tags)

    def _set_tags(self, run: Any, tags: dict[str, str]) -> None:
        """Those that it has not."""
        from mlflow.entities import RunTag

        missing = [RunTag(k, v) for k, v in tags.items() if run.data.tags.get(k) != v]
        self.client.log_batch(run.info.run_id, tags=missing)

    def _delete(self, runs: Iterable[Any]) -> None:
        for run in runs:
            self.client.delete_run(run.info.run_id)

    def _runs(self) -> list[Any]:
        """The chain's runs, oldest first; without deleted ones."""
        wanted = f"tags.`{PARAMS_KEY}` = '{self.tags[PARAMS_KEY]}'"
        order = ["attributes.start_time ASC"]
        found = self.client.search_runs([self.experiment], wanted, order_by=order)
        return [run for run in found if run.data.tags.get(POINT) == self.tags.get(POINT)]

    def _experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self.client.get_experiment_by_name(name)) is None:
            # A teller in another working folder may come first.
            with contextlib.suppress(MlflowException):
                return self.client.create_experiment(name, artifacts)
            found = self.client.get_experiment_by_name(name)
        return found.experiment_id


def connect(uri: str) -> tuple["MlflowClient", str | None]:
    """A client of the store, and where a new experiment's artifacts go; None: the store decides."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient
    from mlflow.store.db.db_types import DATABASE_ENGINES
    from sqlalchemy import create_engine, make_url

    for name in ("mlflow", "urllib3", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our one warning says it
    artifacts = None
    if urlsplit(uri).scheme.partition("+")[0] in DATABASE_ENGINES:
        url = make_url(uri)
        if url.get_backend_name() == "sqlite" and url.database:
            # Absolute, so that `mlflow ui` finds them wherever it is started.
            database = Path(url.database).absolute()
            database.parent.mkdir(parents=True, exist_ok=True)
            artifacts = (database.parent / "mlartifacts").as_uri()
            if not database.exists():
                make(database, artifacts)
        with create_engine(url).connect():
            pass  # MLflow would take minutes to give up
    return MlflowClient(tracking_uri=uri), artifacts


def make(database: Path, artifacts: str) -> None:
    """A store where there is none, complete or absent: one half made would never open again."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    # Not the lock of the database: `replaced` takes that one itself, and would end ours with it.
    with alone(database.with_name(f"{database.name}.making")):
        if database.exists():  # made as we waited, from another working folder
            return
        with replaced(database) as partial:
            # What a killed one has left, its journal too.
            for leftover in partial.parent.glob(f"{partial.name}*"):
                leftover.unlink()
            SqlAlchemyStore(f"sqlite:///{partial}", artifacts).engine.dispose()


def _as_params(values: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(k, v if isinstance(v, str) else json.dumps(v)) for k, v in values.items()]


def _as_metrics(points: list[Point], start_ms: int) -> list[Any]:
    """With times that are the same whoever tells, so that a point that arrives twice is one point."""
    from mlflow.entities import Metric

    return [Metric(p.metric, p.value, start_ms + p.after_ms, p.step) for p in points]


def _about() -> dict[str, str]:
    """Who tells: versions and commit, as far as they are known, and host.

    The teller's, which runs in the environment that the stages run in. A stage's own host, where it is
    known, is ``dgmr.host``.
    """
    tags = {
        "dgmr.version": getattr(dgmr, "__version__", "unknown"),
        "dgmr.python": platform.python_version(),
        "dgmr.told_on": socket.gethostname(),
    }
    tags |= {f"dgmr.{name}": version for name, version in versions("torch", "timm").items()}
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", ".")
    if commit is not None and changes is not None:
        tags["mlflow.source.git.commit"] = commit
        tags["dgmr.git_dirty"] = str(bool(changes)).lower()
    return tags


def _git(*arguments: str) -> str | None:
    """What git says in the workflow's folder; None where it cannot."""
    command = ["git", "-C", str(Path(__file__).parents[2]), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
