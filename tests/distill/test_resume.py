"""Killed or stopped at any moment, a run ends at the very bits of one that never was."""

import itertools
import json
import os
import random
import signal
import time

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.files import read_json, write_json
from dgmr.params import Stage
from dgmr.prune import prune_model
from safetensors.torch import load

STEPS = 60
BOTH = (0, 1, 2), ("float32", "bfloat16")


def write_dropping(folder):
    """The pruned student, with rates among its arguments, as a file of timm's may have them."""
    artefact.save(folder, prune_model(tiny.vit(), 0.5), {"stage": "prune"})
    about = read_json(folder / "config.json")
    about["model_args"] |= {"proj_drop_rate": 0.1, "drop_path_rate": 0.2}
    write_json(folder / "config.json", about)
    return folder


def config(**changes):
    values = {"train": "all", "samples": 5 * STEPS, "batch_size": 5, "lr": 1e-3, "ema": 0.9}
    return Stage.model_validate(values | {"end_weight_decay": 0.2, "seed": 8} | changes)


@pytest.fixture
def dropping(place):
    """A student that draws random numbers in every step."""
    place.parent = write_dropping(place.folder / "with-dropout")
    return place


class Watched:
    """A run whose every step is logged, and which is killed at will."""

    def __init__(self, place, name, config, workers, **hooks):
        self.place, self.name, self.config = place, name, config
        self.options = {"workers": workers, "checkpoint_every_s": 0}
        self.log = place.folder / f"{name}.log"
        self.hooks = {"log": {"path": str(self.log)}} | hooks
        self.attempts = []
        """Where each began, by what was logged, and the checkpoints that were there before."""

    def lines(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def seen(self):
        """(step, pairs) of all that was begun, in turn."""
        return [(step, pairs) for step, _, pairs in map(json.loads, self.lines())]

    def attempt(self, more=None, then=0.0):
        """Run, and kill it some seconds after so many more steps; gives the exit status."""
        before = len(self.lines())
        there = self.place.steps(self.name) if self.place.runs(self.name).exists() else []
        pid = self.place.start(self.name, self.config, hooks=self.hooks, **self.options)
        while more is not None and len(self.lines()) < before + more:
            assert os.path.exists(f"/proc/{pid}"), self.place.said(self.name)
            time.sleep(0.002)
        if more is not None:
            time.sleep(then)
            os.kill(pid, signal.SIGKILL)
        status = self.place.forks.wait(pid)
        self.attempts.append((self.seen()[before:], there))
        return status

    def killed(self, times, seed):
        """Killed so often at random moments, then left to end; gives all exit statuses."""
        draw = random.Random(seed)
        most = STEPS // (times + 2)
        kills = [self.attempt(draw.randint(1, most), draw.uniform(0, 0.03)) for _ in range(times)]
        return [*kills, self.attempt()]

    def went_on(self):
        """Whether each attempt began where the newest checkpoint was, and there were some."""
        return any(there for _, there in self.attempts) and all(
            seen and seen[0][0] == max(there, default=0) for seen, there in self.attempts
        )


def result(place, name):
    """Bytes of the artefact and of all tensors of the last training checkpoint."""
    state = load(place.checkpoint(name))
    return place.bytes(name), {key: raw(tensor) for key, tensor in state.items()}


def raw(tensor):
    return tensor.dtype, tensor.shape, tensor.flatten().view(torch.uint8).numpy().tobytes()


def assert_survives(place, config, workers, kills, seed):
    whole = Watched(place, "whole", config, workers)
    assert whole.attempt() == 0, place.said("whole")
    order = dict(whole.seen())
    assert list(order) == list(range(STEPS))
    run = Watched(place, "killed", config, workers)
    assert run.killed(kills, seed) == [-signal.SIGKILL] * kills + [0], place.said("killed")
    assert run.went_on()
    # Every step was done, some twice, always with the same pairs.
    assert all(order[step] == pairs for step, pairs in run.seen())
    assert dict(run.seen()) == order
    assert result(place, "killed") == result(place, "whole")
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in place.history(name)]
        for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == STEPS


def test_killed_at_random_it_ends_at_the_same_bits(dropping):
    assert_survives(dropping, config(), workers=1, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "precision"), list(itertools.product(*BOTH)))
def test_killed_ten_times_it_ends_at_the_same_bits(dropping, workers, precision):
    seed = 10 * workers + len(precision)
    assert_survives(dropping, config(precision=precision), workers, 10, seed)


def test_what_these_tests_look_at_can_be_lost(dropping):
    """Where no checkpoint is found, or a part of it is lost, it would be noticed."""
    place = dropping
    whole = Watched(place, "whole", config(), 0)
    assert whole.attempt() == 0
    forgetful = Watched(place, "forgetful", config(), 0, forget={})
    assert forgetful.killed(1, seed=1) == [-signal.SIGKILL, 0]
    assert not forgetful.went_on()
    assert result(place, "forgetful") == result(place, "whole")  # it did all again
    for part in ("optimizer/", "ema/"):
        name = part.strip("/")
        losing = Watched(place, name, config(), 0, lose={"prefix": part})
        assert losing.killed(1, seed=1) == [-signal.SIGKILL, 0]
        assert losing.went_on()
        assert place.bytes(name) != place.bytes("whole")


def test_dropout_is_in_what_was_shown(dropping, parent):
    """Else the tests above would not see random numbers that are drawn otherwise."""
    student = artefact.load(dropping.parent).train()
    block = student.blocks[1]
    assert (block.mlp.drop1.p, block.drop_path1.drop_prob) == pytest.approx((0.1, 0.2))
    dropping.train("with", config(samples=10))
    dropping.parent = parent  # the same weights
    dropping.train("without", config(samples=10))
    assert dropping.bytes("with") != dropping.bytes("without")


def test_random_numbers_that_are_no_function_of_the_step_would_be_noticed(dropping):
    whole = Watched(dropping, "whole", config(), 0, drift={})
    assert whole.attempt() == 0
    run = Watched(dropping, "run", config(), 0, drift={})
    assert run.killed(1, seed=1) == [-signal.SIGKILL, 0] and run.went_on()
    assert dropping.bytes("run") != dropping.bytes("whole")


SHORT = {"samples": 60, "batch_size": 5}
STOPS = {
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "one of each": [signal.SIGTERM, signal.SIGINT],
}


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_it_saves_the_step_it_names(dropping, stop, workers):
    place = dropping
    place.train("whole", config(**SHORT))
    hooks = {"signals": {"at": 4, "numbers": STOPS[stop], "to_group": workers > 0}}
    run = Watched(place, "run", config(**SHORT), workers, **hooks)
    run.options["checkpoint_every_s"] = 300
    assert run.attempt() == 143
    assert place.said("run").splitlines()[-1] == (
        "dgmr: distill stage: stopped after step 5 of 12, and saved; the same command goes on"
        " from there."
    )
    assert "Traceback" not in place.said("run")
    assert "going on" not in place.said("run")
    assert place.steps("run") == [5] and not (place.folder / "run").exists()
    del run.hooks["signals"]
    assert run.attempt() == 0
    assert "distill stage: going on after step 5 of 12" in place.said("run")
    assert run.went_on()
    assert [step for step, _ in run.seen()] == list(range(12))
    assert place.bytes("run") == place.bytes("whole")


def test_a_stop_in_the_last_step_is_its_end(dropping):
    place = dropping
    hooks = {"signals": {"at": 11, "numbers": [signal.SIGTERM]}}
    assert place.run("run", config(**SHORT), hooks=hooks) == [0]
    assert place.steps("run") == [12] and (place.folder / "run").exists()


def test_more_signals_are_only_noted(dropping):
    """Torchrun sends again what a scheduler has sent to all processes."""
    place = dropping
    hooks = {"signals": {"at": 4, "numbers": [signal.SIGTERM] * 3 + [signal.SIGINT] * 2}}
    assert place.run("run", config(**SHORT), hooks=hooks) == [143]
    assert place.steps("run") == [5] and "after step 5 of 12" in place.said("run")


def test_the_real_command_stops_and_goes_on(place):
    """Every process of its group gets the signal, as from a shell or a scheduler."""
    long = config(samples=4000, batch_size=4)
    run = place.command("run", long, checkpoint_every_s=0, workers=1)
    until = time.monotonic() + 90
    while not (place.runs("run").exists() and place.steps("run")):
        assert run.poll() is None and time.monotonic() < until, place.said("run")
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 143
    named = int(place.said("run").split("stopped after step ")[1].split(" of 1000")[0])
    assert place.steps("run")[-1] == named < 1000
