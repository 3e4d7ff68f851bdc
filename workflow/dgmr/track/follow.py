"""Follow stages as they train: a process of its own, beside them, that reads their files."""

import sys
import time
from pathlib import Path

from dgmr.errors import DgmrError
from dgmr.params import Params
from dgmr.track.accounts import Account, Room, all_rooms, look
from dgmr.track.tell import tell

_POLL_S = 5.0


def follow(params: Params, results: Path, wait_s: float = 600.0) -> None:
    """Tell the store what the stages write, until all are done or none has trained for ``wait_s`` seconds.

    Those of the run with these params, and of the points of its sweep, which lie under its ``results``.
    A stage whose process is gone is told as KILLED, as RUNNING when it goes on. Where the store cannot
    be reached, it is told later, once it can.

    Raises:
        DgmrError: there is no store.
    """
    if params.mlflow.tracking_uri is None:
        raise DgmrError("track follow: mlflow.tracking_uri is null; name a store to be told.")
    stages = [room for room in all_rooms(params, results) if room.stage]
    told: dict[Room, Account] = {}
    seen: dict[Room, Account | None] = {}
    warning = None
    trained_at = time.monotonic()
    while True:
        try:
            before, seen = seen, {room: look(room) for room in stages}
        except FileNotFoundError:  # an artefact is being replaced
            time.sleep(_POLL_S)
            continue
        news = {
            room: account
            for room, account in seen.items()
            if account is not None
            and account != told.get(room)
            # A stage's stamp comes a moment after its process has ended.
            and (account.status != "KILLED" or account == before.get(room))
        }
        if news:
            outcome = tell(news)
            if outcome.warning and outcome.warning != warning:
                print(outcome.warning, file=sys.stderr, flush=True)
            warning = outcome.warning
            for room in (room for room, is_known in outcome.known.items() if is_known):
                last, told[room] = told.get(room), news[room]
                if last is None or last.status != told[room].status:
                    print(f"{room}: {told[room].status.lower()}", flush=True)
        if any(account and account.status == "RUNNING" for account in seen.values()):
            trained_at = time.monotonic()
        is_done = all(account and account.status == "FINISHED" for account in seen.values())
        if is_done or time.monotonic() - trained_at > wait_s:
            return
        time.sleep(_POLL_S)
