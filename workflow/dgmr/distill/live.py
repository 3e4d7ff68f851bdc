"""What a stage has so far, for those who watch it: ``live.json`` in its run folder.

The trainer writes a file and waits for nobody; ``dgmr track follow`` reads it.
"""

import contextlib
import os
import socket
import time
from pathlib import Path

from dgmr.distill.history import History
from dgmr.errors import DgmrError
from dgmr.files import write_json

LIVE = "live.json"
_EVERY_S = 10.0
_PART = 0.005
"""Of the stage's time that writing may take, on whatever file system."""


class Live:
    """Output folder, host and process, step, steps and the rows so far."""

    def __init__(self, run: Path, steps: int, output: Path) -> None:
        self._file = run / LIVE
        self._about = {
            "output": str(output.resolve()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "steps": steps,
        }
        self._due = 0.0

    def write_if_due(self, step: int, history: History) -> None:
        """After ``step`` steps, every ten seconds; a file that cannot be written fails no stage."""
        if (began := time.monotonic()) < self._due:
            return
        with contextlib.suppress(OSError, DgmrError):
            write_json(self._file, self._about | {"step": step, "rows": history.state()["rows"]})
        now = time.monotonic()
        self._due = now + max(_EVERY_S, (now - began) / _PART)
