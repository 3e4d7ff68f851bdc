"""A stage trains what it should, as its config says, and leaves an artefact and its history."""

import math

import pytest
import tiny
import torch
from dgmr import artefact
from dgmr.distill import trainer
from dgmr.distill.pairs import PairOrder, Pairs
from dgmr.distill.trainer import train
from dgmr.errors import DgmrError
from dgmr.files import read_json
from dgmr.mlps import mlps
from dgmr.models import outputs
from dgmr.params import Stage
from dgmr.prune import prune_model


@pytest.fixture(scope="module")
def parent(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("distill") / "pruned"
    artefact.save(folder, prune_model(artefact.load(teacher), 0.5), {"stage": "prune"})
    return folder


@pytest.fixture
def run(tmp_path, parent, teacher, data, features):
    """Train a short stage; gives the artefact and its history."""

    def run(name="stage", **changes):
        values = {"train": "all", "samples": 32, "batch_size": 4, "lr": 1e-3, "warmup": 0.25}
        config = Stage.model_validate(values | changes)
        train(name, parent, teacher, data, features, config, tmp_path / name)
        return tmp_path / name, read_json(tmp_path / name / "history.json")

    return run


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


def test_all_changes_all_that_the_features_depend_on(run, parent):
    before = state(parent)
    folder, _ = run(train="all")
    untouched = before.keys() - changed(before, state(folder))
    assert untouched == {"head.weight", "head.bias"}


def test_loss_falls(run, teacher, data, features):
    folder, history = run(samples=240, batch_size=8, lr=3e-3)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    pairs = Pairs(data, features, artefact.load(teacher))
    images = torch.stack([pairs[index, 0].image for index in range(9)])
    with torch.inference_mode():
        said = outputs(artefact.load(teacher), images)
        answer = outputs(artefact.load(folder), images)
    found = sum((a - b).square().mean().item() for a, b in zip(said, answer, strict=True))
    assert found < 0.5 * history[0]["loss"]


def test_same_seed_gives_the_same_bits_and_another_seed_others(run):
    torch.manual_seed(1)
    first, history = run("first", seed=5)
    torch.manual_seed(2)
    again, history_again = run("again", seed=5)
    other, _ = run("other", seed=6)
    hashes = [artefact.provenance(folder)["sha256"] for folder in (first, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    for row in history + history_again:
        del row["images_per_s"]
    assert history == history_again


def test_a_step_is_adamw_on_the_first_pairs(run, parent, teacher, data, features):
    """Three steps by hand, with plain torch and a constant learning rate."""
    about = {"lr": 1e-3, "min_lr": 1e-3, "warmup": 0, "weight_decay": 0.3, "clip_grad": 0.05}
    folder, history = run(samples=13, batch_size=4, seed=2, **about)  # the last pair is left over
    student = artefact.load(parent).train()
    skipped = student.no_weight_decay()
    named = dict(student.named_parameters())
    decayed = [p for name, p in named.items() if p.ndim > 1 and name not in skipped]
    others = [p for name, p in named.items() if p.ndim <= 1 or name in skipped]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0}], lr=1e-3, weight_decay=0.3
    )
    pairs = Pairs(data, features, student)
    shown = list(PairOrder(9, 2, 12, seed=2))
    for step in range(3):
        batch = [pairs[pair] for pair in shown[4 * step : 4 * step + 4]]
        answer = outputs(student, torch.stack([pair.image for pair in batch]))
        loss = torch.zeros(())
        for key in ("pooled", "patch_tokens"):
            said = torch.stack([getattr(pair.teacher, key) for pair in batch])
            loss = loss + (getattr(answer, key) - said).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(
            sum(p.grad.square().sum().item() for p in named.values() if p.grad is not None)
        )
        assert norm > 0.05  # so that clipping counts
        for parameter in named.values():
            if parameter.grad is not None:
                parameter.grad *= 0.05 / norm
        optimizer.step()
        assert history[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    found = artefact.load(folder)
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-4, atol=1e-6)


def test_lr_rises_from_0_to_its_peak_then_falls_in_a_cosine(run):
    _, history = run(samples=40, batch_size=2, lr=1e-3, min_lr=1e-5, warmup=0.25)
    rates = [row["lr"] for row in history]
    rising = [1e-3 * step / 5 for step in range(1, 6)]
    falling = [
        1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 15)) / 2 for step in range(1, 16)
    ]
    assert rates == pytest.approx(rising + falling, rel=1e-9)
    assert rates[4] == 1e-3 and rates[-1] == 1e-5


@pytest.mark.parametrize(
    ("warmup", "min_lr", "first", "last"),
    [(0, 1e-5, None, 1e-5), (1, 1e-5, 1e-3 / 8, 1e-3), (0, 1e-2, 1e-3, 1e-3)],
    ids=["no warm-up", "warm-up only", "min_lr above lr"],
)
def test_lr_at_the_borders(run, warmup, min_lr, first, last):
    _, history = run(warmup=warmup, min_lr=min_lr, lr=1e-3)
    rates = [row["lr"] for row in history]
    assert rates[-1] == pytest.approx(last)
    assert first is None or rates[0] == pytest.approx(first)
    assert max(rates) <= 1e-3 * (1 + 1e-12)


def test_loss_weights_are_used(run):
    _, plain = run("plain")
    _, tokens = run("tokens", loss={"pooled": 0, "patch_tokens": 2})
    for row in tokens:
        assert row["loss"] == pytest.approx(2 * row["patch_tokens"], rel=1e-6)
        assert row["pooled"] > 0
    for row in plain:
        assert row["loss"] == pytest.approx(row["pooled"] + row["patch_tokens"], rel=1e-6)
    assert tokens[0]["pooled"] == pytest.approx(plain[0]["pooled"], rel=1e-6)
    assert tokens[-1]["pooled"] != plain[-1]["pooled"]


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
    monkeypatch.setattr(trainer, "_HISTORY_ROWS", 4)
    _, short = run("short", samples=21, batch_size=2)
    # Rows of three steps, the last of what is left.
    assert [row["samples"] for row in short] == [6, 12, 18, 20]
    for rows, row in zip(
        (history[:3], history[3:6], history[6:9], history[9:]), short, strict=True
    ):
        assert (row["step"], row["lr"]) == (rows[-1]["step"], rows[-1]["lr"])
        for key in ("loss", "pooled", "patch_tokens"):
            assert row[key] == pytest.approx(sum(r[key] for r in rows) / len(rows))


def test_provenance_tells_parent_config_and_samples(run, parent):
    folder, _ = run("second", samples=33)
    found = artefact.provenance(folder)
    assert found["stage"] == "distill second"
    assert found["parent_sha256"] == artefact.provenance(parent)["sha256"]
    assert found["samples"] == 32  # whole batches only
    assert Stage.model_validate(found["config"]).samples == 33


def test_stages_go_on_from_each_other(run, teacher, data, features, tmp_path):
    first, _ = run("first")
    config = Stage(train="mlp", samples=8, batch_size=4, lr=1e-3)
    train("second", first, teacher, data, features, config, tmp_path / "second")
    assert changed(state(first), state(tmp_path / "second")) == {
        name for name in state(first) if ".mlp." in name
    }


def test_cached_features_in_half_precision_train_too(tmp_path, parent, teacher, data):
    room = tiny.write_features(tmp_path, teacher, data, tiny.features_config(dtype="bfloat16"))
    config = Stage(train="mlp", samples=8, batch_size=4, lr=1e-3)
    train("half", parent, teacher, data, room, config, tmp_path / "half")
    assert all(math.isfinite(row["loss"]) for row in read_json(tmp_path / "half" / "history.json"))


@pytest.mark.parametrize("family", ["registers", "swin", "attention pool"])
def test_other_families_train(tmp_path, data, family):
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.FAMILIES[family]())
    room = tiny.write_features(tmp_path, teacher, data, tiny.features_config())
    artefact.save(tmp_path / "pruned", prune_model(artefact.load(teacher), 1), {})
    config = Stage(train="mlp", samples=8, batch_size=4, lr=1e-3)
    train("some", tmp_path / "pruned", teacher, data, room, config, tmp_path / "some")
    before, after = state(tmp_path / "pruned"), state(tmp_path / "some")
    expected = {
        f"{name}.{key}"
        for name, mlp in mlps(artefact.load(tmp_path / "some")).items()
        for key, _ in mlp.module.named_parameters()
    }
    assert changed(before, after) == expected


def test_features_of_another_teacher_are_refused(tmp_path, parent, data, features):
    other = tiny.write_teacher(tmp_path / "other", tiny.vit(seed=1))
    config = Stage(train="mlp", samples=8, batch_size=4, lr=1e-3)
    with pytest.raises(DgmrError, match="results/features was made by another teacher"):
        train("some", parent, other, data, features, config, tmp_path / "some")
    assert not (tmp_path / "some").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_that_is_no_number_stops_the_stage_by_name(tmp_path, run, precision):
    with pytest.raises(DgmrError, match=r"distill\.stages\.wild: the loss is (nan|inf) at step \d"):
        run("wild", lr=1e30, warmup=0, clip_grad=None, precision=precision)
    assert not list(tmp_path.glob("wild*"))


def test_damaged_parents_are_refused(tmp_path, teacher, data, features):
    parent = tiny.write_teacher(tmp_path / "parent")
    tiny.damage(parent / "model.safetensors")
    config = Stage(train="mlp", samples=8, batch_size=4, lr=1e-3)
    with pytest.raises(DgmrError, match="model.safetensors is not the file"):
        train("some", parent, teacher, data, features, config, tmp_path / "some")
