"""profiles/slurm with a real Slurm: what it does to jobs, and what becomes of them."""

import contextlib
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

PROFILE = Path(__file__).parents[2] / "profiles/slurm/config.yaml"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"}
STEPS = 48
# Every room, and few jobs a room. Steps take a second or so: what is killed at once has not saved.
MLP = {"train": "mlp", "samples": STEPS * 6400, "batch_size": 6400, "lr": 1e-3, "min_lr": 1e-5}
SMALL = {
    "data__n_samples": 200,
    "prune__parts": 1,
    "distill__stages": {"mlp": MLP},
    "distill__checkpoint_every_s": 1,
    "mlflow__tracking_uri": None,
}


def site(folder, **distill_stage):
    """The profile as this site edits it; gives the options that name it."""
    profile = yaml.safe_load(PROFILE.read_text())
    profile |= {"latency-wait": 10, "slurm-status-command": "squeue"}
    profile |= {"slurm-init-seconds-before-status-checks": 5, "slurm-keep-successful-logs": True}
    profile["retries"] = 4
    profile["set-resources"]["distill_stage"] |= distill_stage
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return "--workflow-profile", str(folder)


def rules_of(place):
    """Those whose jobs were on the cluster."""
    return {path.name.removeprefix("rule_") for path in (place / "logs/slurm").iterdir()}


def models(place):
    found = (place / "results").rglob("model.safetensors")
    return {
        str(path.relative_to(place.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def test_jobs_go_through_sbatch(slurm, new_place, tmp_path):
    place = new_place(**SMALL)
    options = site(tmp_path / "site")
    done = place.run(*options, "--until", "order_blocks", cores=None, **slurm.environment)
    assert done.status == 0, done.output
    assert rules_of(place) == {"order_blocks"}
    logs = sorted((place / "logs/slurm").rglob("*.log"))
    assert [slurm.state(log.stem) for log in logs] == ["COMPLETED"]


class Stage:
    """The jobs of the one stage, one after the other, and the Snakemake that submits them."""

    def __init__(self, slurm, place, *options):
        self.slurm, self.place, self.options = slurm, place, options
        self.jobs = []
        self.start()

    def start(self):
        with (self.place / "said.txt").open("w") as said:
            self.snakemake = self.place.start(
                said, *self.options, cores=None, **self.slurm.environment
            )

    def finish(self):
        """What Snakemake says, once all is done."""
        status = self.snakemake.wait(800)
        said = (self.place / "said.txt").read_text()
        assert status == 0, said
        return said

    def wait(self, condition, seconds=800):
        until = time.monotonic() + seconds
        while not (found := condition()):
            assert self.snakemake.poll() is None, (self.place / "said.txt").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        return found

    def next_job(self):
        def new():
            listed = self.slurm.said("squeue", "--noheader", "--states=all", "--format=%i %k")
            named = re.findall(r"^(\d+) rule_distill_stage", listed, re.M)
            return next((job for job in named if job not in self.jobs), None)

        self.jobs.append(self.wait(new))
        return self.jobs[-1]

    def ended(self, job):
        return self.wait(lambda: (state := self.slurm.state(job)) in ENDED and state)

    def steps(self):
        """Of the newest checkpoint."""
        found = (self.place / "work/distill").rglob("step-????????")
        return max((int(path.name[5:]) for path in found), default=0)

    def goes_on(self):
        """Wait until it has trained further."""
        before = self.steps()
        self.wait(lambda: self.steps() > before)

    def hold(self):
        """Stop the trainer until Slurm tells it to end: a job that is over cannot run out of time.

        Slurm sends SIGCONT before SIGTERM.
        """
        for process in self.processes():
            process.suspend()

    def processes(self):
        """Those of the trainer."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ValueError):  # it ended, or has no -m
                words = process.cmdline()
                # torchrun and srun have the same words, further behind.
                is_trainer = words[words.index("-m") :][:4] == ["-m", "dgmr", "distill", "train"]
                if is_trainer and process.cwd() == str(self.place.folder):
                    yield process

    def said(self, job):
        (log,) = (self.place / "logs/slurm").rglob(f"{job}.log")
        return log.read_text()

    def stopped_after(self, job):
        return int(re.search(r"stopped after step (\d+) of .*, and saved", self.said(job))[1])

    def went_on_after(self, job):
        return int(re.search(r"going on after step (\d+) of", self.said(job))[1])


@contextlib.contextmanager
def started(*arguments):
    stage = Stage(*arguments)
    try:
        yield stage
    finally:
        if stage.snakemake.poll() is None:
            stage.snakemake.kill()


@pytest.fixture(scope="module")
def workstation(new_place):
    """The same chain where nothing happens to it; with all cores, as jobs have them."""
    place = new_place(**SMALL)
    done = place.run(cores=os.cpu_count())
    assert done.status == 0, done.output
    return place


@pytest.mark.slow
def test_a_chain_that_suffers_ends_as_on_a_workstation(slurm, workstation, new_place, tmp_path):
    """Out of memory, warned, out of time, cancelled, put back into the queue, Snakemake killed; then it may
    end."""
    place = new_place(**SMALL)
    warned_before = yaml.safe_load(PROFILE.read_text())["set-resources"]["distill_stage"]
    options = site(
        tmp_path / "site",
        mem_mb="300 if attempt == 1 else 8000",
        slurm_extra=f"'' if attempt == 3 else {warned_before['slurm_extra']}",
    )
    with started(slurm, place, *options) as stage:
        killed = stage.next_job()
        assert stage.ended(killed) in {"OUT_OF_MEMORY", "FAILED", "CANCELLED"}
        assert stage.steps() == 0

        warned = stage.next_job()
        stage.goes_on()
        stage.hold()
        slurm.said("scontrol", "update", f"JobId={warned}", "TimeLimit=3")
        assert stage.ended(warned) == "FAILED"

        late = stage.next_job()
        stage.goes_on()
        stage.hold()
        slurm.said("scontrol", "update", f"JobId={late}", "TimeLimit=1")
        assert stage.ended(late) == "TIMEOUT"

        cancelled = stage.next_job()
        stage.goes_on()
        slurm.said("scancel", cancelled)
        assert stage.ended(cancelled) == "CANCELLED"

        requeued = stage.next_job()
        stage.goes_on()
        slurm.said("scontrol", "requeue", requeued)
        stage.wait(lambda: slurm.state(requeued) == "PENDING")
        again_from = stage.steps()
        slurm.said("scontrol", "update", f"JobId={requeued}", "StartTime=now")
        stage.goes_on()

        # Snakemake itself, whose job lives on.
        stage.snakemake.kill()
        stage.snakemake.wait()
        assert slurm.state(requeued) == "RUNNING"
        stage.start()
        stage.next_job()  # a first attempt, without enough memory
        last = stage.next_job()
        assert f"Jobs that it left in Slurm are cancelled: {requeued}." in stage.finish()
    assert "exceeded memory limit" in stage.said(killed)
    assert stage.went_on_after(late) == stage.stopped_after(warned)
    assert stage.went_on_after(cancelled) == stage.stopped_after(late)
    assert stage.stopped_after(cancelled) < again_from == stage.went_on_after(requeued)
    assert stage.stopped_after(requeued) == stage.went_on_after(last) < STEPS
    assert models(place) == models(workstation)
    assert len(models(place)) == 4  # teacher, pruned, distilled, student
    assert rules_of(place) >= {"targets", "calibration", "distill_stage", "evaluate_model"}
    fetching = {"teacher", "check", "fashion_table", "select_samples", "pack_evaluation"}
    assert not rules_of(place) & fetching


@pytest.mark.slow
def test_two_nodes_train_as_one_process(slurm, workstation, tmp_path):
    place = workstation.copy(tmp_path / "copy")
    for path in (place / "results/distill", place / "work/distill"):
        shutil.rmtree(path)
    several = {"nodes": 2, "gpu": 2, "gres": "gpu:1", "mpi": "srun", "tasks": 2, "tasks_per_gpu": 0}
    options = site(tmp_path / "site", **several)
    with started(slurm, place, *options, "--until", "distill_stage") as stage:
        stage.next_job()

        def members():
            found = {}
            for process in stage.processes():
                with contextlib.suppress(psutil.Error):
                    told = process.environ()
                    if told.get("WORLD_SIZE") == "2":
                        found[told["RANK"]] = told["SLURMD_NODENAME"]
            return len(found) == 2 and found

        assert set(stage.wait(members).values()) == {"n1", "n2"}
        stage.finish()
    one, two = (
        load_file(of / "results/distill/mlp/model.safetensors") for of in (workstation, place)
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-4) for name in one)
