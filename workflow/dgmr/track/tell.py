"""Tell the store; no failure of it fails or long delays a job, but ends in one warning."""

import contextlib
import re
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from dgmr.errors import DgmrError
from dgmr.keys import Keys
from dgmr.params import Params
from dgmr.track.accounts import Account, Room, all_rooms, look, read, rooms
from dgmr.track.store import Chain

LOCK = Path("work/track.lock")
LIMIT_S = 180.0
"""Seconds a telling may take, waiting for others included."""
_BYTES_PER_S = 20e6
"""And more for the student's weights, which may have to be sent."""


class Told(NamedTuple):
    """How a telling went."""

    known: dict[Room, bool]
    """By room, whether the store knows it now."""
    warning: str | None


class _TooLate(BaseException):
    """Not an Exception: libraries catch those, and try again."""


def track(room: str, params: Params, results: Path, point: str = "") -> bool:
    """Tell the store what the files of ``room`` under ``results`` say; whether it knows it now.

    That they are of these params, of ``point`` if one is named, is the caller's to know.

    Raises:
        DgmrError: there is no such room, or it is not done.
    """
    by_name = {each.name: each for each in rooms(Keys(params), results, point)}
    if (found := by_name.get(room)) is None:
        raise DgmrError(f"{room} is no room; choose one of {', '.join(by_name)}.")
    account = read(found)
    if account is None:
        raise DgmrError(f"{room} cannot be tracked: its files are not under {results} yet.")
    return _warned(tell({found: account}))[str(found)]


def sync(params: Params, results: Path) -> dict[str, bool]:
    """As :func:`track`, for every room that is done, and every stage that trains or was killed.

    Of the run with these params, and of the points of its sweep, which lie under its ``results``.
    """
    accounts = {room: look(room) for room in all_rooms(params, results)}
    found = {room: account for room, account in accounts.items() if account is not None}
    return _warned(tell(found))


def tell(accounts: dict[Room, Account]) -> Told:
    """Tell the store of these rooms, run after run."""
    known = dict.fromkeys(accounts, False)
    by_run: dict[str, dict[Room, Account]] = {}
    for room, account in accounts.items():
        by_run.setdefault(room.point, {})[room] = account
    for told in by_run.values():
        if warning := _tell_run(told, known):
            return Told(known, warning)
    return Told(known, None)


def _tell_run(accounts: dict[Room, Account], known: dict[Room, bool]) -> str | None:
    """Tell the store of rooms of one run, and note in ``known`` which it knows; the warning if it failed."""
    first = next(iter(accounts))
    params = first.keys.params
    if (uri := params.mlflow.tracking_uri) is None:
        return None
    students = [account.student for account in accounts.values() if account.student is not None]
    size = sum(path.stat().st_size for folder in students for path in folder.iterdir())
    try:
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        # The lock: MLflow has no "create unless it is there".
        with _limit(LIMIT_S + size / _BYTES_PER_S), FileLock(LOCK):
            chain = Chain(uri, params, first.point)
            for room, account in accounts.items():
                chain.tell(room.name, account)
                known[room] = True
    except (Exception, _TooLate) as error:
        # Stores, their drivers and the network raise all sorts of errors, and none may fail a job
        # whose results are there. Our own files have been read by now.
        missing = ", ".join(str(room) for room, is_known in known.items() if not is_known)
        kind = type(error).__name__.lstrip("_")
        text = f"{uri} could not be told of {missing}: {kind}: {error}"
        text = textwrap.shorten(re.sub(r"//[^/\s]*@", "//***@", text), 600)  # without passwords
        return f"Warning: MLflow store {text} (the results are not affected)"
    return None


def _warned(told: Told) -> dict[str, bool]:
    if told.warning:
        print(told.warning, file=sys.stderr)
    return {str(room): is_known for room, is_known in told.known.items()}


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """End what the block does after ``seconds``, whatever it waits for."""

    def late(_number: int, _frame: Any) -> None:
        raise _TooLate(f"no end after {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again, should a library have swallowed it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
