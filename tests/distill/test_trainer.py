"""A stage trains what it should, as its config says, and leaves an artefact and its history."""

import math

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.answers import Answers
from dgmr.distill import history as histories
from dgmr.distill.learner import Learner
from dgmr.distill.pairs import PairOrder, Pairs
from dgmr.distill.trainer import train
from dgmr.errors import DgmrError
from dgmr.files import read_json, write_json
from dgmr.mlps import mlps
from dgmr.models import outputs
from dgmr.params import Running, Stage
from dgmr.prune import prune_model
from timm.models.vision_transformer import Block


def state(folder):
    return artefact.load(folder).state_dict()


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_mlp_leaves_every_other_tensor_bit_by_bit(run, parent):
    before = state(parent)
    folder, _ = run(train="mlp")
    of_mlps = {name for name in before if ".mlp." in name}
    assert len(of_mlps) == 2 * 4
    assert changed(before, state(folder)) == of_mlps


def test_norms_learn_with_the_mlps(run, parent):
    before = state(parent)
    folder, _ = run(train="mlp+norm")
    wanted = {name for name in before if ".mlp." in name or "norm" in name}
    assert changed(before, state(folder)) == wanted


@pytest.mark.parametrize("ema", [None, 0.5])
def test_blocks_leave_every_other_tensor_bit_by_bit(run, parent, ema):
    before = state(parent)
    folder, _ = run(train={"blocks": [1, 1]}, ema=ema)
    assert changed(before, state(folder)) == {n for n in before if n.startswith("blocks.1.")}


def test_all_changes_all_that_the_features_depend_on(run, parent):
    before = state(parent)
    folder, _ = run(train="all")
    untouched = before.keys() - changed(before, state(folder))
    assert untouched == {"head.weight", "head.bias"}


def images_of(pairs, shown):
    return pairs.transform.normalised(pairs[shown].pixels)


def test_loss_falls(run, teacher, data, features):
    folder, history = run(samples=240, batch_size=8, lr=3e-3)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    pairs = Pairs(data, features, artefact.load(teacher))
    images = images_of(pairs, [(index, 0) for index in range(9)])
    with torch.inference_mode():
        said = outputs(artefact.load(teacher), images)
        answer = outputs(artefact.load(folder), images)
    found = sum((a - b).square().mean().item() for a, b in zip(said, answer, strict=True))
    assert found < 0.5 * history[0]["loss"]


def without_speed(history):
    return [{key: value for key, value in row.items() if key != "images_per_s"} for row in history]


def test_same_seed_gives_the_same_bits_and_another_seed_others(run):
    torch.manual_seed(1)
    first, history = run("first", seed=5)
    torch.manual_seed(2)
    again, history_again = run("again", seed=5)
    other, _ = run("other", seed=6)
    hashes = [artefact.provenance(folder)["sha256"] for folder in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert without_speed(history) == without_speed(history_again)


@pytest.fixture(scope="module")
def with_blocks(tmp_path_factory, teacher, data):
    folder = tmp_path_factory.mktemp("with-blocks")
    asked = tiny.features_config(blocks=[0, 1], patch_tokens=3)
    return tiny.write_features(folder, teacher, data, asked)


@pytest.mark.parametrize("ema", [None, 0.7])
def test_steps_are_adamw_by_hand(place, with_blocks, ema):
    """Three steps with plain torch: all terms, clipping, an average, the weight decay's cosine."""
    place.features = with_blocks
    about = {"lr": 1e-3, "min_lr": 1e-3, "warmup": 0, "clip_grad": 0.05, "betas": (0.8, 0.95)}
    about |= {"weight_decay": 0.3, "end_weight_decay": 0.1, "ema": ema, "seed": 2}
    loss_of = {"pooled": 2, "patch_tokens": 1, "blocks": 0.5}
    config = Stage.model_validate(
        # The last pair is left over.
        {"train": "all", "samples": 13, "batch_size": 4, "loss": loss_of} | about
    )
    place.train("stage", config)
    student, teacher = artefact.load(place.parent).train(), artefact.load(place.teacher)
    skipped = student.no_weight_decay()
    named = dict(student.named_parameters())
    decayed = [p for name, p in named.items() if p.ndim > 1 and name not in skipped]
    others = [p for name, p in named.items() if p.ndim <= 1 or name in skipped]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0}], lr=1e-3, betas=(0.8, 0.95)
    )
    seen = {}
    for model, key in ((student, "student"), (teacher, "teacher")):
        for index, block in enumerate(model.blocks):
            block.register_forward_hook(
                lambda _m, _i, output, at=(key, index): seen.update({at: output})
            )
    pairs = Pairs(place.data, place.features, student)
    order = PairOrder(9, 2, seed=2).pairs()
    average = {name: p.detach().clone() for name, p in named.items()}
    history = place.history("stage")
    for step in range(3):
        images = images_of(pairs, [next(order) for _ in range(4)])
        answer = outputs(student, images)
        with torch.no_grad():
            said = outputs(teacher, images)
        of_blocks = [(seen["student", i] - seen["teacher", i]).square().mean() for i in (0, 1)]
        terms = {
            "pooled": (answer.pooled - said.pooled).square().mean(),
            # Every third patch token.
            "patch_tokens": (answer.patch_tokens - said.patch_tokens)[:, ::3].square().mean(),
            "blocks": sum(of_blocks) / 2,
        }
        loss = sum(loss_of[name] * term for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in named.values() if p.grad is not None]
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads))
        assert norm > 0.05  # so that clipping counts
        for grad in grads:
            grad *= 0.05 / norm
        optimizer.param_groups[0]["weight_decay"] = (
            0.1 + 0.2 * (1 + math.cos(math.pi * step / 3)) / 2
        )
        optimizer.step()
        with torch.no_grad():
            for name, p in named.items():
                average[name] = 0.7 * average[name] + 0.3 * p
        for name, value in ({"loss": loss} | terms).items():
            assert history[step][name] == pytest.approx(value.item(), rel=1e-4)
    found = artefact.load(place.folder / "stage")
    expected = {name: p.detach() for name, p in named.items()} if ema is None else average
    for name, parameter in found.named_parameters():
        if name.endswith("qkv.bias"):  # the keys' have no gradient but rounding's
            continue
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=2e-6)
    moved = (
        expected["blocks.0.mlp.fc1.weight"] - state(place.parent)["blocks.0.mlp.fc1.weight"]
    ).abs()
    assert moved.max() > 1e-4  # far more than is allowed above


def gradients(monkeypatch):
    """Those of every step, as the optimizer sees them."""
    found = []
    update = Learner.update

    def noted(self, *arguments):
        found.append({n: p.grad.clone() for n, p in self._trained.items()})
        update(self, *arguments)

    monkeypatch.setattr(Learner, "update", noted)
    return found


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (7, 3), (4, 4)])
def test_several_passes_are_one(run, monkeypatch, batch_size, accumulate):
    """Whatever the sizes of the passes: gradients are of the mean over the images."""
    about = {"samples": batch_size, "batch_size": batch_size, "warmup": 0, "clip_grad": None}
    found = gradients(monkeypatch)
    _, history = run("one", **about)
    _, again = run("several", accumulate=accumulate, **about)
    one, several = found
    for name, gradient in one.items():
        torch.testing.assert_close(several[name], gradient, rtol=1e-5, atol=1e-6)
    for key in ("loss", "pooled", "patch_tokens"):
        assert again[0][key] == pytest.approx(history[0][key], rel=1e-6)


def test_several_passes_train_alike(run):
    one, history = run("one")
    several, again = run("several", accumulate=2)
    for row, other in zip(history, again, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert changed(state(one), state(several))  # sums of another order


@pytest.mark.parametrize("rate", [0, 0.2])
def test_computing_activations_again_gives_the_same_bits(place, monkeypatch, rate):
    place.parent = place.folder / "pruned"
    artefact.save(place.parent, prune_model(tiny.vit(), 0.5), {"stage": "prune"})
    about = read_json(place.parent / "config.json")
    about["model_args"] |= {"proj_drop_rate": rate, "drop_path_rate": rate}
    write_json(place.parent / "config.json", about)
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    place.train("kept", short())
    once = len(calls)
    place.train("again", short(grad_checkpointing=True))
    assert len(calls) - 2 * once == 8 * 2  # steps, blocks
    assert place.bytes("kept") == place.bytes("again")


def short(**changes):
    values = {"train": "all", "samples": 32, "batch_size": 4, "lr": 1e-3, "warmup": 0.25}
    return Stage.model_validate(values | changes)


def test_lr_rises_to_its_peak_then_falls_in_a_cosine(run):
    _, history = run(samples=40, batch_size=2, lr=1e-3, min_lr=1e-5, warmup=0.25)
    rising = [1e-3 * step / 5 for step in range(1, 6)]
    cosine = [(1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    falling = [1e-5 + (1e-3 - 1e-5) * part for part in cosine]
    assert [row["lr"] for row in history] == pytest.approx(rising + falling, rel=1e-9)


def test_a_stage_of_one_step_trains(run, parent):
    folder, history = run(samples=4, warmup=0.1)
    assert [row["lr"] for row in history] == [1e-3]
    assert len(changed(state(parent), state(folder))) > 20


def test_loss_weights_are_used(run):
    _, plain = run("plain")
    _, tokens = run("tokens", loss={"pooled": 0, "patch_tokens": 2})
    for row in tokens:
        assert row["loss"] == pytest.approx(2 * row["patch_tokens"], rel=1e-6)
        assert "pooled" not in row
    for row in plain:
        assert row["loss"] == pytest.approx(row["pooled"] + row["patch_tokens"], rel=1e-6)
    assert tokens[0]["patch_tokens"] == pytest.approx(plain[0]["patch_tokens"], rel=1e-6)
    assert tokens[-1]["patch_tokens"] != plain[-1]["patch_tokens"]


def test_bfloat16_computes_in_it_and_keeps_float32(run):
    exact, exact_history = run("exact")
    rounded, history = run("rounded", precision="bfloat16")
    tensors = state(rounded)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert changed(state(exact), tensors)
    for row, exact_row in zip(history, exact_history, strict=True):
        assert row["loss"] != exact_row["loss"]
        assert row["loss"] == pytest.approx(exact_row["loss"], rel=0.05)
    # Steps are far finer than bfloat16's: weights are not rounded to it.
    weight = tensors["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(weight.bfloat16().float(), weight)


def test_clipping_can_be_off_and_counts(run):
    tight, _ = run("tight", clip_grad=1e-3)
    loose, _ = run("loose", clip_grad=1e9)
    off, _ = run("off", clip_grad=None)
    assert not changed(state(loose), state(off))
    assert changed(state(tight), state(off))


def test_history_has_a_row_a_step_or_about_a_hundred(run, monkeypatch):
    _, history = run("whole", samples=21, batch_size=2)
    assert [row["step"] for row in history] == list(range(1, 11))
    assert [row["samples"] for row in history] == list(range(2, 21, 2))
    columns = {"step", "samples", "lr", "loss", "pooled", "patch_tokens", "images_per_s"}
    assert all(row.keys() == columns and row["images_per_s"] > 0 for row in history)
    monkeypatch.setattr(histories, "_ROWS", 4)
    _, short = run("short", samples=21, batch_size=2)
    # Rows of three steps, the last of what is left.
    assert [row["samples"] for row in short] == [6, 12, 18, 20]
    for rows, row in zip(
        (history[:3], history[3:6], history[6:9], history[9:]), short, strict=True
    ):
        assert (row["step"], row["lr"]) == (rows[-1]["step"], rows[-1]["lr"])
        for key in ("loss", "pooled", "patch_tokens"):
            assert row[key] == pytest.approx(sum(r[key] for r in rows) / len(rows))


@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (99, 99), (100, 100), (101, 51), (1000, 100)])
def test_history_has_about_a_hundred_rows(steps, rows):
    history = histories.History(steps)
    for step in range(1, steps + 1):
        history.add({"loss": float(step)}, 3)
        history.end_step(step, 3 * step, 0.1)
    found = history.finished(steps, 3 * steps, 0.1)
    assert len(found) == rows and found[-1]["step"] == steps


def test_history_goes_on_from_what_was_saved():
    whole, part = histories.History(250), histories.History(250)
    for step in range(1, 251):
        if step == 125:  # within a row of three
            part = histories.History(250, part.state())
        for history in (whole, part):
            history.add({"loss": 1 / step, "pooled": float(step)}, 4)
            history.end_step(step, 4 * step, 0.1 / step)
    assert without_speed(part.finished(250, 1000, 0)) == without_speed(whole.finished(250, 1000, 0))


def test_provenance_tells_parent_config_and_samples(run, parent):
    folder, _ = run("second", samples=33)
    found = artefact.provenance(folder)
    assert found["stage"] == "distill stage"
    assert found["parent_sha256"] == artefact.provenance(parent)["sha256"]
    assert found["samples"] == 32  # whole batches only
    assert found["skipped_steps"] == 0
    assert Stage.model_validate(found["config"]).samples == 33


def test_stages_go_on_from_each_other(run, place):
    first, _ = run("first")
    place.parent = first
    second = place.train("second", short(train="mlp", samples=8))
    assert changed(state(first), state(second)) == {n for n in state(first) if ".mlp." in n}


def test_cached_features_in_half_precision_train_too(place):
    asked = tiny.features_config(dtype="bfloat16")
    place.features = tiny.write_features(place.folder / "half", place.teacher, place.data, asked)
    place.train("stage", short(train="mlp", samples=8))
    assert all(math.isfinite(row["loss"]) for row in place.history("stage"))


@pytest.mark.parametrize("family", ["registers", "swin", "attention pool", "gated with norm"])
def test_other_families_train(place, family):
    """On every term there is, in as many ways as save memory."""
    place.teacher = tiny.write_teacher(place.folder / "teacher", tiny.FAMILIES[family]())
    asked = tiny.features_config(blocks=[0], patch_tokens=2)
    place.features = tiny.write_features(place.folder / "f", place.teacher, place.data, asked)
    place.parent = place.folder / "pruned"
    artefact.save(place.parent, prune_model(artefact.load(place.teacher), 1), {})
    loss = {"blocks": 1}
    place.train("some", short(train="mlp", samples=8, loss=loss))
    before, after = state(place.parent), state(place.folder / "some")
    expected = {
        f"{name}.{key}"
        for name, mlp in mlps(artefact.load(place.folder / "some")).items()
        for key, _ in mlp.module.named_parameters()
    }
    assert changed(before, after) == expected
    saving = short(train="mlp", samples=8, loss=loss, grad_checkpointing=True)
    place.train("saving", saving)
    assert place.bytes("some") == place.bytes("saving")


def test_blocks_of_the_answers_are_swins_tokens_too(place):
    model = tiny.swin()
    asked = tiny.features_config(blocks=[0, 1])
    seen = {}
    for index, layer in enumerate(model.layers):
        layer.blocks[-1].register_forward_hook(lambda _m, _i, o, at=index: seen.update({at: o}))
    with torch.inference_mode():
        said = Answers(model, asked)(tiny.pixels())
    assert torch.equal(said["blocks.0"], seen[0].flatten(1, 2))
    assert torch.equal(said["blocks.1"], seen[1].flatten(1, 2))


def test_a_students_width_may_differ_by_block(place):
    place.parent = place.folder / "uneven"
    widths = {"blocks.0.mlp": 128, "blocks.1.mlp": 20}
    dense = artefact.load(place.teacher)
    artefact.save(place.parent, prune_model(dense, hidden_features=widths), {})
    folder = place.train("stage", short())
    assert (folder / "loader.py").is_file()
    assert len(changed(state(place.parent), state(folder))) > 20


def test_features_of_another_teacher_are_refused(place):
    place.teacher = tiny.write_teacher(place.folder / "other", tiny.vit(seed=1))
    with pytest.raises(DgmrError, match="results/features was made by another teacher"):
        place.train("some", short())
    assert not (place.folder / "some").exists()


def test_damaged_parents_are_refused(place):
    place.parent = tiny.write_teacher(place.folder / "parent")
    tiny.damage(place.parent / "model.safetensors")
    with pytest.raises(DgmrError, match="model.safetensors is not the file"):
        place.train("some", short())


def test_runs_go_to_their_default_where_nothing_is_said(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    rooms = place.parent, place.teacher, place.data, place.features
    train("stage", *rooms, short(samples=8), place.folder / "out", running=Running(workers=0))
    (run,) = (place.folder / "work" / "distill").iterdir()
    assert [path.name for path in run.glob("step-*")] == ["step-00000002"]
    assert read_json(run / "step-00000002" / "state.json")["bad_steps"] == []
