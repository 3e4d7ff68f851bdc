"""Of several writers of one path each writes in its turn; real processes, killed at random."""

import errno
import fcntl
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dgmr import files
from dgmr.errors import DgmrError

PACKAGES = Path(__file__).parents[1] / "workflow"
LETTERS = "abcdef"
NAMES = ("a", "b", "inner/c")
both = pytest.mark.parametrize("kind", ["file", "folder"])


def text(letter):
    """Each writer's differs in all bytes, and in length."""
    return letter * (3000 + 500 * LETTERS.index(letter))


# A writer as a process of its own: argv is kind, target, letter, times and "locked" or "unlocked".
WRITER = f"""
import contextlib, logging, os, sys, time
sys.path.insert(0, {str(PACKAGES)!r})
from pathlib import Path
from dgmr import files

kind, target, letter, times, lock = sys.argv[1:]
target = Path(target)
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
if lock == "unlocked":
    files.alone = lambda path: contextlib.nullcontext()
text = letter * (3000 + 500 * {LETTERS!r}.index(letter))

def write(path):
    with path.open("w") as file:
        for start in range(0, len(text), 1000):
            file.write(text[start : start + 1000])
            file.flush()
            time.sleep(0.001)

for _ in range(int(times)):
    if kind == "file":
        with files.replaced(target) as partial:
            write(partial)
    else:
        with files.replaced_folder(target) as partial:
            (partial / "inner").mkdir()
            for name in {NAMES!r}:
                write(partial / name)
"""


def start(kind, target, letter, times=10_000, lock="locked"):
    # -S: no site packages, which the writer does not need and which take time.
    command = [sys.executable, "-S", "-c", WRITER, kind, str(target), letter, str(times), lock]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def read_file(target):
    """What is under the name, or None where there is nothing."""
    return target.read_text() if target.exists() else None


def read_folder(target):
    """As :func:`read_file`, the texts joined; None, too, where it was replaced in the meantime."""
    try:
        folder = os.open(target, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        found = []
        for name in NAMES:
            try:
                with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
                    found.append(file.read())
            except FileNotFoundError:
                found.append("missing")
        try:
            is_there = os.path.samestat(os.fstat(folder), target.stat())
        except FileNotFoundError:
            is_there = False
        return "".join(found) if is_there else None
    finally:
        os.close(folder)


READ = {"file": read_file, "folder": read_folder}
WHOLE = {
    "file": {text(letter) for letter in LETTERS},
    "folder": {len(NAMES) * text(letter) for letter in LETTERS},
}


def faults(kind, target, lock, seconds, seed):
    """Six writers at once, one killed and started anew now and then; what went wrong, as set of words.

    Gives, too, by how many different writers' contents the reader saw, and how many were killed.
    """
    draw = random.Random(seed)
    writers = {letter: start(kind, target, letter, lock=lock) for letter in LETTERS}
    wrong, seen, kills = set(), set(), 0
    until, next_kill = time.monotonic() + seconds, time.monotonic() + 0.5
    while time.monotonic() < until and not wrong:
        found = READ[kind](target)
        if found is not None and found not in WHOLE[kind]:
            wrong.add("torn")
        seen.add(found)
        if time.monotonic() > next_kill:
            letter = draw.choice(LETTERS)
            writers[letter].kill()
            said = writers[letter].communicate()[1]
            wrong |= {"died"} if "Traceback" in said else set()
            writers[letter] = start(kind, target, letter, lock=lock)
            next_kill += draw.uniform(0, 0.15)
            kills += 1
    for writer in writers.values():
        writer.kill()
        wrong |= {"died"} if "Traceback" in writer.communicate()[1] else set()
    return wrong, len(seen - {None}), kills


@both
def test_what_is_read_is_always_one_writers_whole_content(tmp_path, kind):
    target = tmp_path / "target"
    wrong, contents, kills = faults(kind, target, "locked", seconds=4, seed=1)
    assert not wrong
    assert contents >= 3 and kills > 10  # several had their turn
    # What the killed ones left does not pile up, and is in nobody's way.
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"target", "target.partial", "target.discarded", "target.lock"}
    process = start(kind, target, "a", 1)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
    assert READ[kind](target) == len(NAMES if kind == "folder" else "1") * text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@both
def test_without_the_lock_it_would_not_be(tmp_path, kind):
    wrong, *_ = faults(kind, tmp_path / "target", "unlocked", seconds=30, seed=1)
    assert wrong


@both
def test_a_finished_crowd_leaves_nothing_but_the_last_content(tmp_path, kind):
    target = tmp_path / "target"
    crowd = [start(kind, target, letter, 5) for letter in LETTERS]
    said = "".join(writer.communicate(timeout=60)[1] for writer in crowd)
    assert [writer.returncode for writer in crowd] == [0] * len(crowd), said
    assert READ[kind](target) in WHOLE[kind]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    pids = "|".join(str(writer.pid) for writer in crowd)
    lines = said.splitlines()
    assert lines
    sentence = rf"{target} is being written by (process ({pids}) on \S+|another process):"
    for line in lines:
        assert re.fullmatch(f"{sentence} waiting until that has ended.", line), line


# One that holds the lock until it is killed, with a child that lives on, as a loader's workers may.
HOLDER = f"""
import os, sys, time
sys.path.insert(0, {str(PACKAGES)!r})
from pathlib import Path
from dgmr import files

with files.alone(Path(sys.argv[1])):
    if sys.argv[2] == "forking":
        child = os.fork()
        if child == 0:
            time.sleep(600)
    print(child if sys.argv[2] == "forking" else 0, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Have a process hold the lock of a path; gives it."""
    begun = []

    def hold(path, how="alone"):
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLDER, str(path), how], stdout=subprocess.PIPE, text=True
        )
        process.child = int(process.stdout.readline())
        begun.append(process)
        return process

    yield hold
    for process in begun:
        process.kill()
        process.wait()
        process.stdout.close()
        if process.child:
            os.kill(process.child, signal.SIGKILL)


def test_a_killed_holders_lock_ends_with_it_though_its_children_live(tmp_path, hold):
    holder = hold(tmp_path / "x", "forking")
    with pytest.raises(DgmrError), files.alone(tmp_path / "x", 0.2):
        pass
    holder.kill()
    holder.wait()
    os.kill(holder.child, 0)  # it is there
    with files.alone(tmp_path / "x", 5):
        pass
    assert not list(tmp_path.iterdir())


def test_who_waits_says_for_whom_and_gives_up_at_the_limit(tmp_path, hold, caplog):
    holder, path = hold(tmp_path / "x"), tmp_path / "x"
    waited, began = [], time.monotonic()
    limited = files.alone(path, 0.6, lambda: waited.append(1))
    with caplog.at_level(logging.INFO), pytest.raises(DgmrError) as error, limited:
        raise AssertionError("both are in")
    assert 0.6 <= time.monotonic() - began < 5 and len(waited) > 2
    who = f"{path} is {{}}being written by process {holder.pid} on {os.uname().nodename}"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"{who.format('')}: waiting until that has ended."
    assert str(error.value) == (
        f"{who.format('still ')}, after 0.01 minutes of waiting: wait until that has ended, or end"
        " it, and run snakemake again."
    )
    assert (tmp_path / "x.lock").exists()  # it is the other's still


def test_a_wait_can_be_left(tmp_path, hold):
    hold(tmp_path / "x")

    def leave():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), files.alone(tmp_path / "x", math.inf, leave):
        pass


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """The holder before ended between the opening and the locking, and a third one made a new file."""
    lockf, lock = fcntl.lockf, tmp_path / "x.lock"
    left = [2]

    def late(file, how):
        if left[0]:
            left[0] -= 1
            lock.unlink()
            if left[0]:
                lock.write_text("a third one's")
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with files.alone(tmp_path / "x"):
        assert not left[0]
        assert lock.read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    assert not lock.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_file_systems_without_locks_do_without(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    files.write_json(tmp_path / "x", 1)
    assert files.read_json(tmp_path / "x") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_other_errors_of_locking_are_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        files.write_json(tmp_path / "x", 1)
