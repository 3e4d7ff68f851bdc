"""Whichever write fails for want of room: old or new state, a sentence, and the next run mends all."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from dgmr import artefact, checkpoint
from full_disk.inject import FULL, ONCE, Python, Step, quiet, tried
from full_disk.steps import STEPS, Rooms

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(HERE.parents[1] / "workflow"), str(HERE.parent))),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
SLOW = {"export"}
"""Seconds a time."""
LONG = {"assemble", "convert", "distill", "prune_again", "report", "sequential_refits", "targets"}
"""Tenths of a second."""


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet():
        yield Rooms(tmp_path_factory.mktemp("rooms"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(STEPS.keys() - SLOW))
def test_by_what_python_opens_and_flushes(rooms, tmp_path, name):
    step = Step(name, rooms, tmp_path)
    most, how = (2, FULL) if name in LONG else (None, ONCE)
    found = tried(step, Python(), most, (how,), both_states=False)
    assert not found["faults"] and found["tried"] == (most or found["changes"][how])


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The library that is preloaded."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")) or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = str(HERE / "shim.c")
    flags = ["-O1", "-shared", "-fPIC", source, "-o", str(library), "-ldl"]
    done = subprocess.run([compiler, *flags], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the shim cannot be compiled: {done.stderr}")
    return library


def start(shim, folder, most, names):
    command = [sys.executable, "-m", "full_disk.inject", str(shim), str(folder), str(most), *names]
    env = ENVIRONMENT | {"LD_PRELOAD": str(shim)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def told(process, seconds):
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0
    return [json.loads(line) for line in said.splitlines()]


def assert_sound(found, names):
    assert [step["step"] for step in found] == list(names)
    assert [fault for step in found for fault in step["faults"]] == []


def test_by_system_calls(shim, tmp_path):
    """Native libraries' too: Parquet's."""
    names = "select", "features_publish", "orders"
    found = told(start(shim, tmp_path, 4, names), 120)
    assert_sound(found, names)
    assert all(step["changes"][ONCE] > 20 for step in found)


# Of the steps with very many writes, so many are drawn.
MOST = 80


@pytest.mark.slow
def test_by_every_system_call(shim, tmp_path):
    """In two processes; ``-s`` shows how many."""
    names = sorted(STEPS.keys() - SLOW)
    halves = names[::2], names[1::2]
    running = [start(shim, tmp_path / str(i), MOST, half) for i, half in enumerate(halves)]
    running.append(start(shim, tmp_path / "slow", 2, sorted(SLOW)))
    for process, half in zip(running, (*halves, sorted(SLOW)), strict=True):
        found = told(process, 3600)
        for step in found:
            print(json.dumps(step | {"faults": len(step["faults"])}))
        assert_sound(found, half)


@contextlib.contextmanager
def mounted(folder, size):
    """A small disk of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_command_on_a_disk_that_is_full(tmp_path):
    source = tiny.write_teacher(tmp_path / "source")
    config = json.dumps({"model": f"local-dir:{source}"})
    with mounted(tmp_path / "disk", "100k") as disk:
        output = disk / "teacher"
        command = [sys.executable, "-m", "dgmr", "teacher", "convert", "--config", config]
        command += ["--output", str(output)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            f"dgmr: {output} cannot be written (No space left on device): make room on its disk,"
            " or mend it, and run snakemake again."
        )
        assert "Traceback" not in done.stderr and not list(disk.iterdir())
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert subprocess.run(command, env=ENVIRONMENT).returncode == 0
        assert [path.name for path in disk.iterdir()] == ["teacher"]
        same = (source / checkpoint.WEIGHTS).read_bytes()
        assert (output / checkpoint.WEIGHTS).read_bytes() == same and artefact.load(output)
