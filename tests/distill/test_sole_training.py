"""Of several jobs that train the same run, as an orphan and its successor may, one writes at a time."""

import json
import os
import signal
import time

import pytest
from dgmr.params import Stage

STEPS = 12


def config():
    values = {"train": "all", "samples": 4 * STEPS, "batch_size": 4, "lr": 1e-3, "ema": 0.9}
    return Stage.model_validate(values)


@pytest.fixture
def whole(place):
    place.train("whole", config())
    return place.bytes("whole")


class Two:
    """A run of which the first job pauses before step 5, and a second one."""

    def __init__(self, place):
        self.place, self.log, self.go = place, place.folder / "log", place.folder / "go"

    def start(self, paused=False, env=None, **hooks):
        given = {"log": {"path": str(self.log)}} | hooks
        if paused:
            given["pause"] = {"at": 5, "until": str(self.go)}
        options = {"checkpoint_every_s": 0, "workers": 1 if paused else 0}
        return self.place.start("run", config(), env, given, **options)

    def steps(self):
        """That were begun, in turn."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line)[0] for line in lines]

    def first(self, **hooks):
        """The first job, in its pause; gives its process id."""
        pid = self.start(paused=True, **hooks)
        self.until(lambda: self.steps() == [0, 1, 2, 3, 4])
        self.until(lambda: self.place.steps("run") == [4, 5])
        return pid

    def until(self, is_so):
        end = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < end, self.place.said("run")
            time.sleep(0.01)

    def waits(self, pid):
        """The sentence of one who waits for ``pid``."""
        (run,) = self.place.runs("run").iterdir()
        who = f"process {pid} on {os.uname().nodename}"
        return f"{run / 'training'} is being written by {who}: waiting until that has ended."


@pytest.fixture
def two(place):
    return Two(place)


def test_the_second_waits_and_ends_at_once_with_the_same_result(two, whole):
    place = two.place
    first = two.first()
    second = two.start()
    two.until(lambda: two.waits(first) in place.said("run"))
    assert place.forks.wait(second, 1) is None
    two.go.touch()
    assert place.forks.wait(first) == 0
    # Its step begins after the last checkpoint: there is none left to be done.
    assert place.forks.wait(second) == 0, place.said("run")
    assert f"going on after step {STEPS} of {STEPS}" in place.said("run")
    assert two.steps() == list(range(STEPS))
    assert place.bytes("run") == whole
    assert [path.name for path in place.run_folder("run").glob("step-*")] == [f"step-{STEPS:08d}"]


def test_killed_while_another_waits_the_other_goes_on(two, whole):
    """At once, though the loader's processes of the first live on for a while."""
    place = two.place
    first = two.first()
    second = two.start()
    two.until(lambda: two.waits(first) in place.said("run"))
    os.kill(first, signal.SIGKILL)
    assert place.forks.wait(first) == -signal.SIGKILL
    assert place.forks.wait(second) == 0, place.said("run")
    assert two.steps() == list(range(STEPS))
    assert place.bytes("run") == whole
    assert [path.name for path in place.run_folder("run").glob("step-*")] == [f"step-{STEPS:08d}"]


def test_without_the_lock_they_would_write_at_once(two):
    place = two.place
    first = two.first(careless={})
    second = two.start(careless={})
    assert place.forks.wait(second) == 0
    assert place.steps("run") == [STEPS]
    two.go.touch()
    place.forks.wait(first)
    assert two.steps() != list(range(STEPS))  # done twice, and checkpoints written over


def test_it_does_not_wait_for_ever(two):
    place = two.place
    first = two.first()
    second = two.start(impatient={"seconds": 0.6})
    assert place.forks.wait(second) == 2
    (run,) = place.runs("run").iterdir()
    assert place.said("run").splitlines()[-1] == (
        f"dgmr: {run / 'training'} is still being written by process {first} on"
        f" {os.uname().nodename}, after 0.01 minutes of waiting: wait until that has ended, or end"
        " it, and run snakemake again."
    )
    two.go.touch()
    assert place.forks.wait(first) == 0


def test_it_can_be_stopped_while_it_waits(two):
    place = two.place
    first = two.first()
    second = two.start()
    two.until(lambda: two.waits(first) in place.said("run"))
    os.kill(second, signal.SIGTERM)
    assert place.forks.wait(second) == 143
    assert place.said("run").splitlines()[-1] == (
        "dgmr: distill stage: stopped while another process was training the same run."
    )
    two.go.touch()
    assert place.forks.wait(first) == 0 and two.steps() == list(range(STEPS))


def test_several_processes_wait_together(two, whole):
    """The one that does not lock waits with the first, and stops with it."""
    place = two.place
    first = two.first()
    assert place.run("run", config(), 2, {"impatient": {"seconds": 1}})[0] == 2
    assert place.run("run", config(), 2, [None, {"stop_soon": {}}]) == [143, 143]
    two.go.touch()
    assert place.run("run", config(), 2) == [0, 0], place.said("run")
    assert place.forks.wait(first) == 0
    assert two.steps() == list(range(STEPS)) and place.bytes("run") == whole
