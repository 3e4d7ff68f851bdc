"""Let the n-th change of the disk fail, whichever it is, and see what is left. See ``shim.c``.

As a program, with the shim preloaded: ``inject.py <shim> <folder> <most> <step> ...`` prints a line of
JSON a step.
"""

import contextlib
import ctypes
import errno
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

from dgmr.distill import checkpoints
from dgmr.errors import DgmrError
from dgmr.evaluate import accuracy
from dgmr.features import targets
from full_disk.steps import GOES_ON, STEPS, Rooms

TIMES = {"seconds", "images_per_s"}
"""Keys of JSON files under which is how long something took."""
SCRAPS = (".partial", ".discarded", ".lock", ".tmp")
FULL, ONCE, BROKEN = "full", "once", "broken"
"""The disk has no room from then on; for that one change; or it has a fault."""
NUMBER = {FULL: errno.ENOSPC, ONCE: errno.ENOSPC, BROKEN: errno.EIO}


class Shim:
    """Changes are system calls, native libraries' too."""

    def __init__(self, library):
        self._library = ctypes.CDLL(library)

    def arm(self, folder, at, how):
        given = f"{folder}/".encode(), ctypes.c_long(at), how == FULL, NUMBER[how]
        self._library.arm(*given)

    def disarm(self):
        count = self._library.counted()
        self._library.arm(b"", 0, 0, 0)
        return count


class Python:
    """Changes are what this interpreter opens, makes, links, renames or flushes; no tools needed."""

    _folder = ""
    _hooked = False
    _now = None

    def __init__(self):
        if not Python._hooked:  # there is no way to take one away
            Python._hooked = True
            sys.addaudithook(Python._heard)

    def arm(self, folder, at, how):
        self._folder, self._at, self._how, self._seen = f"{folder}/", at, how, 0
        Python._now = self

    def disarm(self):
        Python._now = None
        return self._seen

    @staticmethod
    def flush(descriptor):
        """In place of ``os.fsync``; what really is on the disk is of no interest here, and takes time."""
        if Python._now:
            Python._now._changed(os.readlink(f"/proc/self/fd/{descriptor}"))

    @staticmethod
    def _heard(event, arguments):
        now = Python._now
        if now is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str) and flags & os.O_CREAT and not os.path.exists(path):
                now._changed(path)
        elif event == "os.mkdir":
            now._changed(arguments[0])
        elif event == "os.link" or (event == "os.rename" and now._how != FULL):
            now._changed(arguments[1])

    def _changed(self, path):
        if not os.path.abspath(path).startswith(self._folder):
            return
        self._seen += 1
        if self._at and (self._seen == self._at or (self._seen > self._at and self._how == FULL)):
            number = NUMBER[self._how]
            raise OSError(number, os.strerror(number), str(path))


def content(folder):
    """Bytes of all files by name, without how long things took, and without training checkpoints."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith("runs/"):
            found[name] = path.read_bytes()
            if path.suffix == ".json":
                found[name] = json.dumps(_timeless(json.loads(found[name])))
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(v) for key, v in value.items() if key not in TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


@contextlib.contextmanager
def quiet():
    """Progress and logs are of no interest here, and no loader processes are started."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
        mock.patch.object(targets, "loader_workers", lambda: 0),
        mock.patch.object(accuracy, "loader_workers", lambda: 0),
        mock.patch.object(os, "fsync", Python.flush if Python._hooked else os.fsync),
    ):
        yield


class Step:
    """A step, and what its two variants leave."""

    def __init__(self, name, rooms, folder):
        self.name, self._rooms, self.folder = name, rooms, folder
        self.left = []
        for variant in (0, 1):
            self.do(folder / str(variant), variant)
            self.left.append(content(folder / str(variant)))
        assert self.left[0] != self.left[1]
        assert all(self.left)

    def do(self, folder, variant=1):
        with quiet():
            folder.mkdir(parents=True, exist_ok=True)
            STEPS[self.name](self._rooms, folder, variant)

    def changes(self, injector, how):
        """How many there are where none fails."""
        place = self._place(0)
        injector.arm(place, 0, how)
        try:
            self.do(place)
        finally:
            count = injector.disarm()
        assert count and content(place) == self.left[1]
        return count

    def faults(self, injector, at, how, is_there):
        """What is wrong after the ``at``-th change has failed; ``is_there``: an old result was."""
        place, before = self._place(is_there), self.left[0] if is_there else {}
        said = None
        injector.arm(place, at, how)
        try:
            self.do(place)
        except DgmrError as error:
            said = str(error)
        except Exception as error:
            # A fault of the disk may be told as Python does; it could be another disk's, that is read.
            if how != BROKEN or getattr(error, "errno", None) != errno.EIO:
                return [f"{type(error).__name__}: {error}"]
            said = f"{place}: {os.strerror(errno.EIO)}"
        finally:
            injector.disarm()
        found, wrong = content(place), []
        if said is None and found != self.left[1]:
            wrong.append("no error, and not the new result")
        if said is not None and not (str(place) in said and os.strerror(NUMBER[how]) in said):
            wrong.append(f"said {said!r}")
        if not self._is_allowed(found, before):
            names = found.keys() | before.keys() | self.left[1].keys()
            kinds = {name: self._kind(found.get(name), name, before) for name in sorted(names)}
            wrong.append(f"mixed: {kinds}")
        if scraps := [p.name for p in place.rglob("*") if p.name.endswith(SCRAPS)]:
            wrong.append(f"left {scraps}")
        for run in place.glob("runs/*"):
            steps = {path.name for path in run.glob("step-*")}
            newest = checkpoints.newest(run)
            if steps and (newest is None or f"step-{newest.step:08d}" != max(steps)):
                wrong.append(f"broken checkpoint among {steps}")
        self.do(place)
        if content(place) != self.left[1]:
            wrong.append("with room again, not the new result")
        return wrong

    def _place(self, is_there):
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        if is_there:
            shutil.copytree(self.folder / "0", place)
        else:
            place.mkdir()
        return place

    def _is_allowed(self, found, before):
        if found in (before, self.left[1]):
            return True
        is_listed = any(Path(name).name.startswith("part-") for name in found)
        new = self.left[1]
        whole = all(value in (before.get(name), new.get(name)) for name, value in found.items())
        return self.name in GOES_ON and not is_listed and whole

    def _kind(self, value, name, before):
        kinds = {"absent": None, "old": before.get(name, b"-"), "new": self.left[1].get(name, b"-")}
        return next((kind for kind, known in kinds.items() if value == known), "neither")


def tried(step, injector, most, hows, both_states=True, seed=0):
    """Let change after change fail, or ``most`` of them, drawn at random; counts and what was wrong."""
    draw, found = random.Random(seed), {"step": step.name, "tried": 0, "changes": {}, "faults": []}
    began = time.monotonic()
    for how in hows:
        count = found["changes"][how] = step.changes(injector, how)
        for is_there in (True, False) if both_states and how != BROKEN else (True,):
            chosen = range(1, count + 1)
            if most is not None and count > most:
                chosen = sorted(draw.sample(chosen, most))
            for at in chosen:
                found["tried"] += 1
                for fault in step.faults(injector, at, how, is_there):
                    where = f"change {at} of {count}, disk {how}, old result {is_there}"
                    found["faults"].append(f"{where}: {fault}")
    return found | {"seconds": round(time.monotonic() - began, 1)}


def main(library, folder, most, *names):
    """Try steps with the shim."""
    import torch

    torch.set_num_threads(1)
    folder, injector = Path(folder), Shim(library)
    with quiet():
        rooms = Rooms(folder / "rooms")
    for name in names:
        step = Step(name, rooms, folder / name)
        found = tried(step, injector, int(most) or None, (FULL, ONCE, BROKEN))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
