"""Losses and gradients that are no numbers: skipped, counted, written down, and at last too many."""

import re

import pytest
import torch
from dgmr import artefact
from dgmr.distill import trainer
from dgmr.distill.learner import Learner
from dgmr.distill.pairs import PairOrder
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.params import Stage
from safetensors.torch import load_file


def config(**changes):
    values = {"train": "all", "samples": 48, "batch_size": 4, "lr": 1e-3, "ema": 0.8, "seed": 3}
    return Stage.model_validate(values | changes)


@pytest.fixture
def bad(monkeypatch):
    """In these steps, counted from 1, one answer of the teacher is no number; or a gradient is inf."""
    steps = {"nan": set(), "inf": set()}
    now = [0]
    seed, measure, init = trainer._seed, Learner.measure, Learner.__init__

    def told(of, step, rank):
        now[0] = step + 1
        seed(of, step, rank)

    def measured(self, batch, *arguments):
        if now[0] in steps["nan"]:
            batch.answers["patch_tokens"][1, 2, 3] = torch.nan
        return measure(self, batch, *arguments)

    def made(self, *arguments):
        init(self, *arguments)

        def change(gradient):
            return gradient * torch.inf if now[0] in steps["inf"] else gradient

        dict(self.student.named_parameters())["blocks.0.mlp.fc1.bias"].register_hook(change)

    monkeypatch.setattr(trainer, "_seed", told)
    monkeypatch.setattr(Learner, "measure", measured)
    monkeypatch.setattr(Learner, "__init__", made)
    return steps


def states(place, monkeypatch):
    """The whole state after every step."""
    found = []
    save = trainer.checkpoints.save

    def saved(folder, step, tensors, about, group):
        tensors = list(tensors)
        found.append({name: tensor.detach().clone() for name, tensor in tensors})
        save(folder, step, tensors, about, group)

    monkeypatch.setattr(trainer.checkpoints, "save", saved)
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("clip_grad", [1.0, None])
def test_a_bad_step_changes_nothing_and_those_after_it_go_on(
    place, monkeypatch, bad, kind, clip_grad
):
    bad[kind].add(7)
    found = states(place, monkeypatch)
    place.train("run", config(clip_grad=clip_grad), checkpoint_every_s=0)
    after = [None, *found]
    assert same(after[7], after[6])
    assert not same(after[6], after[5]) and not same(after[8], after[7])
    assert all(tensor.isfinite().all() for tensor in after[12].values())
    assert after[12]["optimizer/step/norm.weight"] == 11
    assert artefact.provenance(place.folder / "run")["skipped_steps"] == 1
    assert [row["step"] for row in place.history("run")] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]


def test_the_steps_after_it_are_those_of_a_run_without_it(place, monkeypatch, bad):
    """By hand: the learning rate is the step's, whatever was skipped before."""
    bad["nan"].add(7)
    place.train("skipped", config())
    bad["nan"].clear()
    update = Learner.update
    monkeypatch.setattr(
        Learner, "update", lambda self, step, n: None if step == 6 else update(self, step, n)
    )
    place.train("left out", config())
    assert place.bytes("skipped") == place.bytes("left out")
    monkeypatch.setattr(Learner, "update", update)
    place.train("whole", config())
    assert place.bytes("skipped") != place.bytes("whole")


@pytest.mark.parametrize(("kind", "loss", "norm"), [("nan", "nan", "nan"), ("inf", "", "inf")])
def test_what_was_skipped_is_written_down(place, bad, kind, loss, norm):
    bad[kind] |= {2, 5}
    place.train("run", config())
    found = read_json(place.run_folder("run") / "bad_steps.json")
    assert [about["step"] for about in found] == [2, 5]
    shown = list(zip(range(48), PairOrder(9, 2, seed=3).pairs(), strict=False))
    for about in found:
        start = 4 * (about["step"] - 1)
        pairs = [{"key": f"sample-{i}", "view": view} for _, (i, view) in shown[start : start + 4]]
        assert about["pairs"] == pairs
        assert about["gradient_norm"] == norm
        assert about["loss"] == loss or (kind == "inf" and float(about["loss"]) > 0)


@pytest.mark.parametrize("most", [0, 2])
def test_more_than_allowed_stop_the_stage_in_a_sentence(place, bad, most):
    bad["nan"] |= {4, 6, 7}
    with pytest.raises(DgmrError) as error:
        place.train("run", config(), checkpoint_every_s=0, max_bad_steps=most)
    step, count = (4, 1) if most == 0 else (7, 3)
    run = place.run_folder("run")
    assert str(error.value) == (
        f"distill.stages.stage: the loss is nan and the gradient's norm nan at step {step}, the"
        f" {count}. step to be skipped, and distill.max_bad_steps is {most}: lower lr, or train in"
        f" float32; {run / 'bad_steps.json'} names the images."
    )
    assert [about["step"] for about in read_json(run / "bad_steps.json")] == [4, 6, 7][:count]
    assert not (place.folder / "run").exists()
    # What was saved last is whole and finite.
    assert place.steps("run") == [step - 2, step - 1]
    kept = trainer.checkpoints.newest(run)
    assert kept.step == step - 1
    assert all(tensor.isfinite().all() for tensor in load_file(kept.file).values())


def test_as_many_as_allowed_do_not_stop_it(place, bad):
    bad["nan"] |= {4, 6, 7}
    place.train("run", config(), max_bad_steps=3)
    assert artefact.provenance(place.folder / "run")["skipped_steps"] == 3


def test_a_run_that_goes_on_keeps_the_count(place, bad):
    bad["nan"] |= {2, 4, 9}
    with pytest.raises(DgmrError, match=r"at step 9, the 3\. step to be skipped"):
        place.train("run", config(), checkpoint_every_s=0, max_bad_steps=2)
    with pytest.raises(DgmrError, match=r"at step 9, the 3\. step to be skipped"):
        place.train("run", config(), checkpoint_every_s=0, max_bad_steps=2)
    bad["nan"].clear()  # the steps before 9 are not done again
    place.train("run", config(), max_bad_steps=2)
    assert artefact.provenance(place.folder / "run")["skipped_steps"] == 2


def test_where_every_step_is_bad_the_student_stays(place, bad):
    bad["nan"] |= set(range(1, 13))
    place.train("run", config(), max_bad_steps=12, checkpoint_every_s=0)
    before = artefact.load(place.parent).state_dict()
    assert same(before, place.weights("run")) and place.history("run") == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_learning_rate_far_too_high_stops_the_stage(place, precision):
    wild = config(lr=1e30, warmup=0, clip_grad=None, precision=precision, ema=None)
    with pytest.raises(DgmrError, match=r"the loss is (nan|inf) and .* at step \d+, the 3\. step"):
        place.train("run", wild, max_bad_steps=2)
    assert not (place.folder / "run").exists()


def agreed(place, name):
    """What each of two processes says in its only sentence."""
    return re.findall(r"^dgmr: (.*)$", place.said(name), re.MULTILINE)


@pytest.mark.parametrize("kind", ["poison", "explode"])
def test_what_one_of_two_processes_sees_both_skip(place, kind):
    """Rank 1 alone meets it in step 7; a third at once would hang if the other went on."""
    hooks = {kind: {"steps": [6, 8], "rank": 1}}
    place.done("run", config(), processes=2, hooks=hooks, seconds=60)
    found = read_json(place.run_folder("run") / "bad_steps.json")
    assert [about["step"] for about in found] == [7, 9]
    order = PairOrder(9, 2, seed=3).pairs(24)
    wanted = sorted((f"sample-{i}", view) for i, view in (next(order) for _ in range(4)))
    assert sorted((p["key"], p["view"]) for p in found[0]["pairs"]) == wanted
    assert artefact.provenance(place.folder / "run")["skipped_steps"] == 2
    assert place.run("more", config(), 2, hooks, max_bad_steps=1, seconds=60) == [2, 2]
    said = agreed(place, "more")
    assert len(said) == 2 and len(set(said)) == 1 and "at step 9, the 2. step" in said[0]
