"""Runs of a chain that are killed on their way, and what they leave."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

WHO = {"all": 4, "parent": 3, "job": 3}
"""What is killed, by how often: Snakemake with its jobs, Snakemake alone, or one job alone."""
_TIMED = re.compile(r"images_per_s|seconds|speed")  # no two runs agree on it
_TIMED_FILES = ("report.html", "speed.json")
_TIMED_CELL = re.compile(rb"[\d,]+ \|$", re.MULTILINE)  # of the card's table, images a second
_TIMEOUT_S = 900


def jobs(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The processes of jobs in ``folder``, with the command of each, such as ``prune orders``."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended, or is another user's
            said = process.cmdline()
            if said[1:3] == ["-m", "dgmr"] and process.cwd() == str(folder):
                found[process.pid] = process, process.ppid(), said[3:5]
    for process, parent, words in found.values():
        if parent not in found:  # else it is a fork, such as a loader's
            yield process, " ".join(word for word in words if re.fullmatch("[a-z][a-z-]*", word))


def names(folder: Path, *patterns: str) -> set[Path]:
    """Files and folders in ``folder`` by the end of their paths, while others come and go."""
    return {
        path
        for where, folders, files in os.walk(folder)
        for path in (Path(where, name) for name in folders + files)
        if any(path.match(pattern) for pattern in patterns)
    }


def artefacts(folder: Path) -> dict[str, str]:
    """For each file in ``folder`` the hash of what it says, but for times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _TIMED_FILES and ".discarded/" not in str(path):
            content = path.read_bytes()
            if path.name == "README.md":
                content = _TIMED_CELL.sub(b"", content)
            elif path.suffix == ".json":
                content = json.dumps(_untimed(json.loads(content))).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def _group(job: psutil.Process) -> int | None:
    """Its process group, by which orphans of a run before are told from the jobs of this one."""
    try:
        return os.getpgid(job.pid)
    except ProcessLookupError:
        return None


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(of) for key, of in value.items() if not _TIMED.search(key)}
    return [_untimed(of) for of in value] if isinstance(value, list) else value


class History:
    """One history of runs and kills in a folder: each run meets what the one before has left."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        environment: dict[str, str],
        seed: int,
        longest_s: float,
    ) -> None:
        """Where no event is aimed at, a run is killed within ``longest_s`` of its start."""
        self.command, self.folder, self.environment = command, folder, environment
        self.random, self.longest_s = random.Random(seed), longest_s
        self.kills: Counter[tuple[str, str, str]] = Counter()
        """By what was killed, at what it was aimed, and the step that was hit."""
        self.orphans = 0
        """Jobs that lived on when their parent was killed."""
        self.said = ""
        """By the last run."""
        self.last = ""
        """How the last run ended."""
        self._done: dict[Path, int] = {}
        self._wiped = 0
        self._was_locked = False

    def run(self, is_killed: bool = False) -> bool:
        """Run the command, and kill it if so told; whether it came to its end.

        Raises:
            AssertionError: it failed of itself, did again what had been done, or did not say what it
                found.
        """
        who = self.random.choices(list(WHO), list(WHO.values()))[0]
        aim = self.random.choice(list(AIMS))
        is_now = AIMS[aim](self)
        late = time.monotonic() + 2 * self.longest_s
        hit = ""
        with (self.folder / "said.txt").open("w") as output:
            process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while is_killed and not hit and process.poll() is None:
                time.sleep(0.002)
                if time.monotonic() > late:  # what it was aimed at does not come
                    aim, is_now = "any moment", lambda: True
                if is_now():
                    hit = self._kill(process, who)
            process.wait(_TIMEOUT_S)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        if who == "job" and process.returncode == 0:
            hit = ""  # it had just ended
        self.last = f"{who} killed, {aim}, in {hit}" if hit else "to its end"
        if hit:
            self.kills[who, aim, hit] += 1
        self._check(process.returncode, (1 if who == "job" else -signal.SIGKILL) if hit else 0)
        return not hit

    def wipe(self) -> None:
        """Take away what makes it start again, wholly or in part."""
        rooms = [room for place in ("results", "work") for room in (self.folder / place).iterdir()]
        some = self.random.sample(rooms, self.random.randint(1, len(rooms)))
        for path in self.random.choice([[self.folder / "results"], rooms, some]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.random.random() < 0.3:  # and with it the list of incomplete files
            shutil.rmtree(self.folder / ".snakemake")
        self._done, self._wiped = {}, time.time_ns()

    def leftovers(self) -> set[Path]:
        """What writers leave only when they are killed."""
        return names(self.folder, "*.partial", "*.discarded")

    def table(self) -> str:
        """Kills by the step that was hit and by what was killed, and by aim."""
        lines = []
        for column, title in ((2, "hit"), (1, "aim")):
            lines.append(f"{title:22}" + "".join(f"{who:>8}" for who in WHO))
            for name in sorted({kill[column] for kill in self.kills}):
                counts = [
                    sum(n for k, n in self.kills.items() if (k[0], k[column]) == (who, name))
                    for who in WHO
                ]
                lines.append(f"{name:22}" + "".join(f"{count:8}" for count in counts))
        return "\n".join(lines)

    def stamps(self) -> dict[Path, int]:
        """What is done, by the stamps."""
        stamps = {}
        for stamp in names(self.folder / "results", "*.stamp"):
            with contextlib.suppress(FileNotFoundError):
                stamps[stamp] = stamp.stat().st_mtime_ns
        return stamps

    def _kill(self, process: subprocess.Popen, who: str) -> str:
        """Kill what is to be; the step that was hit, or nothing where it has ended by then."""
        process.send_signal(signal.SIGSTOP)  # it starts no other job meanwhile
        found = [(job, step) for job, step in jobs(self.folder) if _group(job) == process.pid]
        steps = ", ".join(sorted(step for _, step in found))
        if who == "job":
            process.send_signal(signal.SIGCONT)
            if not found:
                return ""
            victim, step = self.random.choice(found)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                victim.wait(10)
                return step
            return ""
        if process.poll() is not None:
            return ""
        (os.killpg if who == "all" else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        if who == "parent":
            self.orphans += sum(orphan.is_running() for orphan, _ in found)
        is_at_work = any((self.folder / ".snakemake/locks").glob("*"))
        return steps or ("between jobs" if is_at_work else "before the lock")

    def _check(self, status: int, expected: int) -> None:
        self.said = (self.folder / "said.txt").read_text()
        assert status == expected, f"{status}, not {expected}: {self.said}"
        now = self.stamps()
        again = [stamp for stamp, when in self._done.items() if now.get(stamp) != when]
        assert not again, f"{again} were done again: {self.said}"
        if "Building DAG" in self.said:
            assert ("its lock is removed" in self.said) == self._was_locked, self.said
        self._was_locked = any((self.folder / ".snakemake/locks").glob("*"))
        # Where a room was taken away, Snakemake makes its readers too, though they are there.
        self._done = {stamp: when for stamp, when in now.items() if when > self._wiped}


def _at_random(history: History) -> Callable[[], bool]:
    end = time.monotonic() + history.random.uniform(0, history.longest_s)
    return lambda: time.monotonic() > end


def _while_parsing(history: History) -> Callable[[], bool]:
    end = time.monotonic() + history.random.uniform(0, 3)
    return lambda: time.monotonic() > end


def _at(pattern: str) -> Callable[[History], Callable[[], bool]]:
    """As soon as there is a file that was not there before."""

    def aim(history: History) -> Callable[[], bool]:
        before = names(history.folder, pattern)
        return lambda: not before.issuperset(names(history.folder, pattern))

    return aim


def _renamed(history: History) -> Callable[[], bool]:
    """As soon as a temporary name is there no more."""
    before = history.leftovers()
    seen: set[Path] = set()

    def is_now() -> bool:
        now = history.leftovers() - before
        seen.update(now)
        return seen != now

    return is_now


AIMS: dict[str, Callable[[History], Callable[[], bool]]] = {
    "any moment": _at_random,
    "parsing": _while_parsing,
    "locking": _at(".snakemake/locks/*.lock"),
    "writing": _at("*.partial"),
    "renaming": _renamed,
    "discarding": _at("*.discarded"),
    "stamped": _at("*.stamp"),
    "training checkpoint": _at("step-*"),
}
"""Moments to kill at: given a history, a function that tells whether it is now."""
