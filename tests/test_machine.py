"""What jobs share, and locks that outlive their run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dgmr import machine, models

HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from dgmr import machine
machine.take_over_from_the_dead(is_local=sys.argv[2] == "local")
print("alive", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "_alive", [])
    lock = tmp_path / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(parents=True)
    return lock


def another_run(where="local"):
    package = str(Path(machine.__file__).parents[1])
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, package, where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "alive\n"
    return run


def test_lock_of_a_killed_run_is_removed(place, caplog):
    run = another_run()
    place.write_text("results/x\n")  # as Snakemake writes it, after the Snakefile is read
    run.kill()
    run.communicate()
    machine.take_over_from_the_dead()
    assert not place.exists() and "was killed" in caplog.text


@pytest.mark.parametrize("where", ["local", "cluster"])
def test_jobs_that_a_killed_run_left_in_slurm(place, caplog, monkeypatch, tmp_path, where):
    here = Path.cwd()
    jobs = [f"7|rule_targets|{here}", f"8|rule_targets|{here}/b", f"9||{here}", f"10|rule_x|{here}"]
    for name, text in (("squeue", "\n".join(jobs)), ("scancel", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho $@ > {name}.txt\ncat <<.\n{text}\n.\n")
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run = another_run(where)
    assert not (tmp_path / "squeue.txt").exists()  # nobody was killed
    place.write_text("results/x\n")
    run.kill()
    run.communicate()
    machine.take_over_from_the_dead()
    assert (tmp_path / "squeue.txt").exists() == (where == "cluster")
    if where == "cluster":
        assert (tmp_path / "scancel.txt").read_text() == "7 10\n"
        assert "left in Slurm are cancelled: 7 10." in caplog.text


def test_lock_of_a_living_run_stays(place):
    run = another_run()
    try:
        place.write_text("results/x\n")
        machine.take_over_from_the_dead()
        assert place.exists()
        # Nor when the first of two runs has ended, for the second is alive.
        second = another_run()
        run.communicate("")
        machine._alive.clear()
        third = another_run()
        assert place.exists()
        for each in (second, third):
            each.communicate("")
    finally:
        run.kill()


def test_lock_of_another_machine_stays(place, caplog):
    place.write_text("results/x\n")
    (place.parents[1] / "alive.lock").write_text("elsewhere")
    machine.take_over_from_the_dead()
    assert place.exists() and "elsewhere" in caplog.text


def test_no_lock_is_no_warning(place, caplog):
    machine.take_over_from_the_dead()
    assert not caplog.text


def test_memory_is_that_of_the_machine_or_its_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP_LIMIT", tmp_path / "none")
    all_of_it = machine.resources()["mem_mb"]
    assert all_of_it > 1000
    for text, wanted in (("max\n", all_of_it), ("2000000000\n", 2000), (f"{1 << 60}\n", all_of_it)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(machine, "_CGROUP_LIMIT", tmp_path / "limit")
        assert machine.resources()["mem_mb"] == wanted


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("GPU-8a,GPU-9b", 2)],
)
def test_gpus_are_those_that_are_visible(monkeypatch, visible, count):
    monkeypatch.setattr(machine, "glob", lambda pattern: ["/dev/nvidia0", "/dev/nvidia1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.resources()["gpu"] == count


def test_jobs_take_different_accelerators(monkeypatch, tmp_path):
    monkeypatch.setattr(models.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(models, "_locks", [])
    take = models._taken.__wrapped__  # as processes of their own would
    assert [take("cuda", 2) for _ in range(3)] == [0, 1, 0]  # the third shares
    models._locks[0].release()
    assert take("cuda", 2) == 0
