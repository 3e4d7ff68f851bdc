"""Two or three processes train what one does, to rounding."""

import os
import signal
import time

import pytest
import timm
import tiny
import torch
from dgmr import artefact
from dgmr.answers import Answers
from dgmr.distill.pairs import PairOrder, Pairs
from dgmr.files import read_json
from dgmr.params import Stage
from dgmr.prune import prune_model

WAYS = {"ddp": {}, "fsdp": {"shard_above": 0}}
NEAR = 1e-5


def config(**changes):
    """A batch of 7, in two passes each: 4 and 3 images, then 2, 2 and 2, 1."""
    values = {"train": "all", "samples": 84, "batch_size": 7, "lr": 1e-3, "accumulate": 2}
    values |= {"ema": 0.9, "loss": {"blocks": 0.5}, "end_weight_decay": 0.2}
    return Stage.model_validate(values | changes)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory, teacher, data):
    folder = tmp_path_factory.mktemp("rooms")
    asked = {"blocks": [0, 1]}
    return {
        cache: tiny.write_features(
            folder / cache, teacher, data, tiny.features_config(**asked, cache=cache)
        )
        for cache in ("disk", "none")
    }


@pytest.fixture
def place(place, rooms):
    place.features = rooms["disk"]
    return place


def keys_of(name, tensor):
    """A mask of what is the keys' bias: softmax does not feel it, so it has no gradient."""
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    if name.endswith("attn.qkv.bias"):
        mask[len(mask) // 3 : 2 * len(mask) // 3] = True
    return mask


def distance(one, other):
    """The largest difference of two states, but for the keys' biases."""
    assert one.keys() == other.keys()
    return max(
        (one[name] - other[name]).abs()[~keys_of(name, one[name])].max().item() for name in one
    )


@torch.inference_mode()
def outputs_distance(place, *names):
    models = [artefact.load(place.folder / name) for name in names]
    asked = tiny.features_config(blocks=[0, 1])
    one, other = (Answers(model, asked)(tiny.pixels(4)) for model in models)
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_near(place, name, reference="one"):
    one, other = place.weights(reference), place.weights(name)
    start = artefact.load(place.parent).state_dict()
    assert distance(one, other) < NEAR
    assert distance(one, start) > 100 * NEAR  # it has gone far from where it began
    assert outputs_distance(place, reference, name) < NEAR
    losses = [[row["loss"] for row in place.history(n)] for n in (reference, name)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_only_the_keys_biases_have_no_gradient(place):
    """Why they are left out above: in double precision there is nothing, in float32 rounding."""
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        student, teacher = (artefact.load(f).to(dtype) for f in (place.parent, place.teacher))
        asked = tiny.features_config(blocks=[0, 1])
        pairs = Pairs(place.data, place.features, student)
        order = PairOrder(9, 2, seed=0).pairs()
        batch = pairs[[next(order) for _ in range(7)]]
        images = pairs.transform.normalised(batch.pixels).to(dtype)
        with torch.no_grad():
            said = Answers(teacher, asked)(images)
        answers = Answers(student, asked)(images)
        sum((answers[n] - said[n]).square().mean() for n in said).backward()
        gradients[dtype] = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    exact, rounded = gradients[torch.float64], gradients[torch.float32]
    assert len(exact) > 20
    for name, gradient in exact.items():
        of_keys = keys_of(name, gradient)
        assert (gradient[of_keys].abs() < 1e-14).all()
        if not of_keys.any():
            assert gradient.abs().max() > 1e-6, name
        else:
            assert rounded[name][of_keys].abs().max() > 0
            assert gradient[~of_keys].abs().max() > 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(place, way):
    place.train("one", config())
    place.done("two", config(), 2, **WAYS[way])
    assert_near(place, "two")
    student = timm.create_model(f"local-dir:{place.folder / 'two'}", pretrained=True)
    stored = place.weights("two")
    assert all(torch.equal(t, stored[name]) for name, t in student.state_dict().items())
    found = artefact.provenance(place.folder / "two")
    assert found | {"sha256": 0} == artefact.provenance(place.folder / "one") | {"sha256": 0}


def test_memory_savers_go_together(place):
    """Everything at once: sharded, activations computed again, the teacher sharded and asked."""
    place.train("one", config())
    place.features = place.features.parents[1] / "none" / "room"
    together = config(grad_checkpointing=True)
    place.done("all", together, 2, shard_above=0, seconds=120)
    assert_near(place, "all")


def test_uneven_blocks_of_parameters_are_shared(place):
    """Widths that two do not divide."""
    place.parent = place.folder / "uneven"
    dense = artefact.load(place.teacher)
    widths = {"blocks.0.mlp": 37, "blocks.1.mlp": 1}
    artefact.save(place.parent, prune_model(dense, hidden_features=widths), {})
    few = config(samples=21, train="mlp+norm")
    place.train("one", few)
    place.done("two", few, 2, shard_above=0)
    assert distance(place.weights("one"), place.weights("two")) < NEAR
    assert (place.folder / "two" / "loader.py").is_file()


def stop_at(step):
    return {"signals": {"at": step, "numbers": [signal.SIGTERM]}}


@pytest.mark.parametrize("ways", [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_is_shared_by_any_number_of_processes(place, ways):
    """One, then two, then two in the other way, then one."""
    place.train("one", config())
    assert place.run("run", config(), 1, stop_at(2)) == [143]
    for at, way in zip((5, 8), ways, strict=True):
        assert place.run("run", config(), 2, stop_at(at), **WAYS[way]) == [143, 143]
        assert place.steps("run")[-1] == at + 1
        sentence = f"stopped after step {at + 1} of 12, and saved"
        assert place.said("run").count(sentence) == 2
    place.done("run", config())
    assert_near(place, "run")


def test_a_stop_that_one_process_hears_stops_both(place):
    """The other would wait for it without end."""
    few = config(samples=42)
    assert place.run("run", few, 2, [stop_at(3), None], seconds=60) == [143, 143]
    assert place.steps("run") == [4]


def test_a_batch_too_small_to_be_shared_is_refused(place):
    small = config(batch_size=3, accumulate=2)
    assert place.run("run", small, 2) == [2, 2]
    said = [line for line in place.said("run").splitlines() if line.startswith("dgmr:")]
    assert set(said) == {
        "dgmr: distill.stages.stage: a batch_size of 3 cannot be shared by 2 processes in 2 passes:"
        " raise it, or lower accumulate."
    }
    assert not (place.folder / "run").exists()


def test_damaged_targets_are_told_by_the_one_who_verifies(place, data):
    asked = tiny.features_config(blocks=[0, 1])
    place.features = tiny.write_features(place.folder / "f", place.teacher, data, asked)
    tiny.damage(next((place.folder / "f" / "work" / "targets").rglob("*.view0.safetensors")))
    statuses = place.run("run", config(), 2, seconds=60)
    assert statuses[0] == 2 and statuses[1] != 0
    assert "is missing or is not the file" in place.said("run")


# The real command, with torchrun: a start of torch a process.


def test_the_command_starts_its_processes(place):
    few = config(samples=42)
    place.train("one", few)
    run = place.command("two", few, processes=2, shard_above=0)
    assert run.wait(150) == 0, place.said("two")
    assert distance(place.weights("one"), place.weights("two")) < NEAR
    assert outputs_distance(place, "one", "two") < NEAR


# All nodes of a job are this machine.
SRUN = """#!/bin/bash
echo "$@" >> {folder}/srun.txt
for node in 0 1; do "${{@:6}}" & done
wait -n && wait -n
"""


def test_two_nodes_train_as_one_process(place, monkeypatch):
    """Two torchruns that find each other, over the loopback with gloo."""
    bin = place.folder / "bin"
    bin.mkdir()
    (bin / "srun").write_text(SRUN.format(folder=place.folder))
    (bin / "srun").chmod(0o700)
    monkeypatch.setenv("PATH", str(bin), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    few = config(samples=42)
    place.train("one", few)
    run = place.command("two", few, processes=2, nodes=2)
    assert run.wait(150) == 0, place.said("two")
    assert "--nnodes=2" in (place.folder / "srun.txt").read_text()
    assert distance(place.weights("one"), place.weights("two")) < NEAR
    assert outputs_distance(place, "one", "two") < NEAR


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "three"])
def test_the_command_trains_as_one_process(place, way):
    processes = 3 if way == "three" else 2
    place.train("one", config())
    run = place.command("many", config(), processes=processes, **WAYS.get(way, {"shard_above": 0}))
    assert run.wait(240) == 0, place.said("many")
    assert_near(place, "many")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_three_processes_train_as_one(place, way):
    place.train("one", config())
    place.done("three", config(), 3, seconds=150, **WAYS[way])
    assert_near(place, "three")


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [False, True], ids=["launcher", "group"])
def test_the_command_stops_with_all_its_processes(place, to_group):
    """One, then two stopped by SIGTERM, then one again: the checkpoint is shared."""
    long = config(samples=7 * 400)
    place.train("one", long)
    assert place.run("run", long, 1, stop_at(2)) == [143]
    run = place.command("run", long, processes=2, checkpoint_every_s=0)
    until = time.monotonic() + 150
    while place.steps("run")[-1] < 6:
        assert run.poll() is None and time.monotonic() < until, place.said("run")
        time.sleep(0.05)
    (os.killpg if to_group else os.kill)(run.pid, signal.SIGTERM)
    assert run.wait(90) != 0
    said = place.said("run")
    assert ", and saved; the same command goes on from there." in said
    stopped = place.steps("run")[-1]
    assert f"stopped after step {stopped} of 400" in said and stopped < 400
    place.done("run", long)
    assert place.history("run")[-1]["step"] == 400
    losses = [[row["loss"] for row in place.history(n)] for n in ("one", "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert read_json(place.folder / "run" / "provenance.json")["skipped_steps"] == 0
