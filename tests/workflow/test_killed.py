"""SIGKILL in the middle: the same command goes on and ends at the same students."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import time

import pytest
from kills import jobs

PRUNED = ("results/prune",)
STUDENTS = (*PRUNED, "results/distill/mlp", "results/distill/all")


def sha256_of_students(place, folders=STUDENTS):
    return {
        folder: hashlib.sha256((place / folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in folders
    }


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


@pytest.fixture
def unpruned(finished, tmp_path):
    """The chain where the pruning is still to be done."""
    place = finished.copy(tmp_path / "copy").edit(mlflow__tracking_uri=None)
    shutil.rmtree(place / "results/prune")
    shutil.rmtree(place / "work/prune")
    return place


@contextlib.contextmanager
def at_work(place, *arguments, step):
    """Snakemake in ``place``, and the process of its first job that does ``step``."""
    with (place / "said.txt").open("w") as said:
        snakemake = place.start(said, *arguments)
        try:
            while not (found := [job for job, name in jobs(place.folder) if name == step]):
                assert snakemake.poll() is None, (place / "said.txt").read_text()
                time.sleep(0.02)
            yield snakemake, found[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                snakemake.send_signal(signal.SIGKILL)
            for job, _ in jobs(place.folder):
                job.kill()
            snakemake.wait()


def locks(place):
    return list(place.folder.glob(".snakemake/locks/*"))


def test_killed_twice_it_ends_at_the_same_students(place, finished):
    # In a targets job, while it writes; its other files are not in place yet.
    place.kill_when(
        lambda: any(place.folder.glob("work/features/*/targets/*.partial/*")), "distill"
    )
    assert list(place.folder.glob("work/features/*/targets/*.partial/*"))
    assert any((place / ".snakemake/incomplete").iterdir())
    assert locks(place) and not (place / "results/features/manifest.json").exists()

    # In a distillation, once it has saved a training checkpoint.
    place.edit(distill__checkpoint_every_s=0)
    place.kill_when(lambda: any(place.folder.glob("work/distill/*/*/step-????????")), "distill")
    assert (place / "killed.txt").read_text().count(
        "its lock is removed, and the work goes on"
    ) == 1
    assert (place / "results/features/manifest.json").exists()
    assert not (place / "results/distill/mlp/model.safetensors").exists()
    assert not list(jobs(place.folder))  # its loop is dead too

    stored = {p: p.stat().st_mtime_ns for p in place.folder.glob("work/features/*/*/*/*")}
    done = place.finish("distill")
    assert "its lock is removed" in done.output and "unlock" not in done.output
    assert re.search(r"distill mlp: going on after step [1-9] of 10", done.output)
    assert {p: p.stat().st_mtime_ns for p in stored} == stored  # nothing was done twice
    assert sha256_of_students(place) == sha256_of_students(finished)
    assert not place.planned("distill") and not list(place.folder.rglob("*.partial"))
    assert "its lock is removed" not in place.finish("distill").output


def test_two_runs_at_once_and_orphans(unpruned, finished):
    place = unpruned
    with at_work(place, "prune", step="prune orders") as (first, job):
        job.suspend()  # so that it is still there when it is looked at
        second = place.run("prune")
        assert second.status == 1 and "Directory cannot be locked" in second.output
        assert "its lock is removed" not in second.output
        assert place.planned("prune")  # a dry run may be done beside it
        assert locks(place) and first.poll() is None and job.is_running()

        first.kill()
        first.wait()
        assert job.is_running() and locks(place)
        third = place.finish("prune")
        assert "its lock is removed" in third.output
        assert "Jobs that it left at work are ended first" in third.output
        assert not job.is_running() and not list(jobs(place.folder))
    assert sha256_of_students(place, PRUNED) == sha256_of_students(finished, PRUNED)
    (place / ".snakemake/locks").mkdir(exist_ok=True)
    (place / ".snakemake/locks/0.output.lock").write_text("results/metrics.json\n")
    place.finish("--unlock")
    assert not locks(place)


def test_asked_to_stop_it_ends_cleanly_and_goes_on(unpruned, finished):
    place = unpruned
    # A terminal tells all processes; who sends SIGTERM means Snakemake, which awaits its jobs.
    for step, tell, asked in (
        ("prune orders", os.killpg, signal.SIGINT),
        ("prune refits", os.kill, signal.SIGTERM),
    ):
        with at_work(place, "prune", step=step) as (snakemake, _):
            tell(snakemake.pid, asked)
            assert snakemake.wait(120) in (0, 1)  # 0 where all was done when it looked
            assert not list(jobs(place.folder)) and not locks(place)
        said = (place / "said.txt").read_text()
        assert "its lock is removed" not in said and "IncompleteFiles" not in said, said
    done = place.finish("prune")
    assert "its lock is removed" not in done.output
    assert sha256_of_students(place, PRUNED) == sha256_of_students(finished, PRUNED)
