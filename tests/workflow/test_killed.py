"""SIGKILL in the middle: the same command goes on and ends at the same students."""

import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

STUDENTS = ("results/prune", "results/distill/mlp", "results/distill/all")


def sha256_of_students(place):
    return {
        folder: hashlib.sha256((place / folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in STUDENTS
    }


def jobs(place, command):
    """The processes of a ``dgmr`` command in this folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes().decode().split("\0")
            if command in said and os.readlink(process / "cwd") == str(place.folder):
                yield process
        except OSError:  # it ended, or is another user's
            continue


@pytest.fixture
def place(finished, tmp_path):
    """The chain where targets, student and training are still to be done."""
    place = finished.copy(tmp_path / "copy").edit(mlflow__tracking_uri=None)
    for path in place.folder.glob("results/*"):
        if path.name not in ("teacher", "data"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (targets,) = place.folder.glob("work/features/*/targets")
    shutil.rmtree(targets)
    shutil.rmtree(place / "work/distill")  # with it the stages would end at once
    return place


def test_killed_twice_it_ends_at_the_same_students(place, finished):
    # In a targets job, while it writes; its other files are not in place yet.
    place.kill_when(
        lambda: any(place.folder.glob("work/features/*/targets/*.partial/*")), "distill"
    )
    assert list(place.folder.glob("work/features/*/targets/*.partial/*"))
    assert any((place / ".snakemake/incomplete").iterdir())
    assert not (place / "results/features/manifest.json").exists()

    locked = place.run("distill")
    assert locked.status != 0 and "--unlock" in locked.output
    place.finish("--unlock")

    # In a distillation, once it has saved a training checkpoint.
    place.edit(distill__checkpoint_every_s=0)
    place.kill_when(lambda: any(place.folder.glob("work/distill/*/step-????????")), "distill")
    assert (place / "results/features/manifest.json").exists()
    assert not (place / "results/distill/mlp/model.safetensors").exists()
    assert not list(jobs(place, "distill"))  # its loop is dead too

    place.finish("--unlock")
    stored = {p: p.stat().st_mtime_ns for p in place.folder.glob("work/features/*/*/*/*")}
    done = place.finish("distill")
    assert re.search(r"distill mlp: going on after step [1-9] of 10", done.output)
    assert {p: p.stat().st_mtime_ns for p in stored} == stored  # nothing was done twice
    assert sha256_of_students(place) == sha256_of_students(finished)
    assert not place.planned("distill") and not list(place.folder.rglob("*.partial"))
