"""What of the student learns, how fast, with which decay."""

import math

import pytest
import tiny
import torch
from dgmr.distill.learning import (
    learned,
    learning_rate,
    named,
    optimizer,
    schedule,
    weight_decay,
)
from dgmr.errors import DgmrError
from dgmr.params import Stage

EVERY_TERM = {"pooled": 1, "patch_tokens": 1, "blocks": 1}


def stage(**changes):
    values = {"train": "all", "samples": 32, "batch_size": 4, "lr": 1e-3}
    return Stage.model_validate(values | changes)


def skeleton(family):
    with torch.device("meta"):
        return tiny.FAMILIES[family]()


def expected_lr(step, steps, warmup, lr, min_lr):
    """Independently: a line whose value after ``warmup`` steps is lr, then half a cosine."""
    if step < warmup:
        return lr / warmup * (step + 1)
    return min_lr + (lr - min_lr) * math.cos(math.pi / 2 * (step - warmup) / (steps - warmup)) ** 2


@pytest.mark.parametrize(
    ("steps", "warmup", "of_warmup"),
    [(20, 0.25, 5), (20, 0, 0), (7, 0.1, 1), (7, 1, 7), (1, 0, 0), (1, 1, 1), (1, 0.1, 0)],
)
def test_lr_at_every_step(steps, warmup, of_warmup):
    config = stage(lr=1e-3, min_lr=1e-5, warmup=warmup)
    found = [learning_rate(config, step, steps) for step in range(steps)]
    expected = [expected_lr(step, steps, of_warmup, 1e-3, 1e-5) for step in range(steps)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] > 0 and max(found) == 1e-3  # it is reached, and no step is for nothing
    assert all(a <= b for a, b in zip(found[:of_warmup], found[1 : of_warmup + 1], strict=False))
    assert all(a > b for a, b in zip(found[of_warmup:], found[of_warmup + 1 :], strict=False))


@pytest.mark.parametrize("warmup", [0, 0.1, 0.5, 1])
def test_a_stage_of_one_step_trains_at_lr(warmup):
    assert learning_rate(stage(lr=2e-3, warmup=warmup), 0, 1) == 2e-3


def test_the_last_step_is_near_min_lr():
    config = stage(lr=1e-3, min_lr=1e-5, warmup=0.1)
    assert learning_rate(config, 999, 1000) == pytest.approx(1e-5, rel=1e-3)
    assert learning_rate(config, 1000, 1000) == pytest.approx(1e-5, rel=1e-9)


def test_min_lr_above_lr_is_lr():
    config = stage(lr=1e-3, min_lr=1e-2, warmup=0)
    assert {learning_rate(config, step, 8) for step in range(8)} == {1e-3}


def test_weight_decay_goes_to_its_end_in_a_cosine():
    config = stage(weight_decay=0.04, end_weight_decay=0.4)
    found = [weight_decay(config, step, 10) for step in range(11)]
    expected = [0.04 + 0.36 * math.sin(math.pi / 20 * step) ** 2 for step in range(11)]
    assert found == pytest.approx(expected)
    assert found[0] == pytest.approx(0.04) and found[-1] == pytest.approx(0.4)
    assert weight_decay(config, 999, 1000) == pytest.approx(0.4, rel=1e-4)  # of the last step
    assert {weight_decay(stage(weight_decay=0.3), step, 10) for step in range(10)} == {0.3}


def optimized(config):
    student = tiny.vit()
    return student, optimizer(student, config)


def of_parameters(student, found, key):
    """By name, what the optimizer's groups have under ``key``."""
    names = {id(p): name for name, p in student.named_parameters()}
    return {names[id(p)]: group[key] for group in found.param_groups for p in group["params"]}


def test_biases_and_norms_do_not_decay():
    student, found = optimized(stage(weight_decay=0.3, betas=(0.8, 0.9)))
    decays = of_parameters(student, found, "weight_decay")
    for name, parameter in student.named_parameters():
        kept = parameter.ndim < 2 or name in ("pos_embed", "cls_token")
        assert decays[name] == (0 if kept else 0.3), name
    assert {type(found), *(g["betas"] for g in found.param_groups)} == {
        torch.optim.AdamW,
        (0.8, 0.9),
    }


def test_every_step_has_its_rate_and_decay():
    config = stage(weight_decay=0.1, end_weight_decay=0.4, lr=1e-3, warmup=0.5)
    student, found = optimized(config)
    for step in (0, 3, 4, 9):
        schedule(found, config, step, 10)
        decays = of_parameters(student, found, "weight_decay")
        assert set(of_parameters(student, found, "lr").values()) == {
            learning_rate(config, step, 10)
        }
        assert decays["blocks.0.mlp.fc1.weight"] == weight_decay(config, step, 10)
        assert decays["blocks.0.mlp.fc1.bias"] == 0


def test_a_weight_decay_of_0_does_not_rise():
    """There would be no groups to tell what decays; it is refused rather than left at 0."""
    with pytest.raises(ValueError, match="end_weight_decay needs a weight_decay above 0"):
        stage(weight_decay=0, end_weight_decay=0.4)
    student, found = optimized(stage(weight_decay=0))
    assert set(of_parameters(student, found, "weight_decay").values()) == {0}


def test_all_parameters_decay_where_that_is_asked_for():
    config = stage(weight_decay=0.3, end_weight_decay=0.1, decay_all=True)
    student, found = optimized(config)
    decays = of_parameters(student, found, "weight_decay")
    assert decays == {name: 0.3 for name, _ in student.named_parameters()}
    schedule(found, config, 5, 10)
    assert set(of_parameters(student, found, "weight_decay").values()) == {
        weight_decay(config, 5, 10)
    }


def of_mlps(name):
    return ".mlp." in f".{name}"


def of_norms(name):
    """By timm's names: norm, norm1, norm2, fc_norm, norm_pre, q_norm ..., also within an MLP."""
    return any("norm" in part for part in name.split("."))


def beyond_the_features(model, name):
    """The classifier, on which no answer depends."""
    classifier = model.pretrained_cfg["classifier"]
    return isinstance(classifier, str) and name.startswith(f"{classifier}.")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_name_trains_what_it_says(family):
    model = skeleton(family)
    names = {name for name, _ in model.named_parameters()}
    asked = tiny.features_config(blocks=[0])
    reached = {name for name in names if not beyond_the_features(model, name)}
    expected = {
        "all": reached,
        "mlp": {name for name in reached if of_mlps(name)},
        "mlp+norm": {name for name in reached if of_mlps(name) or of_norms(name)},
    }
    for train, wanted in expected.items():
        config = stage(train=train, loss=EVERY_TERM)
        found = learned(skeleton(family), config, asked)
        assert found == wanted, train
    assert expected["mlp"] < expected["mlp+norm"] < expected["all"]
    assert named(model, stage(train="all")) == names


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_train_all_of_theirs_and_no_more(family):
    model = skeleton(family)
    prefixes = ["layers.0.", "layers.1."] if family == "swin" else ["blocks.0.", "blocks.1."]
    prefixes = prefixes[: 1 if family == "attention pool" else 2]
    asked = tiny.features_config()
    for first in range(len(prefixes)):
        for last in range(first, len(prefixes)):
            config = stage(train={"blocks": [first, last]})
            wanted = {
                name
                for name, _ in model.named_parameters()
                if name.startswith(tuple(prefixes[first : last + 1])) and "downsample" not in name
            }
            assert learned(skeleton(family), config, asked) == wanted
    config = stage(train={"blocks": [0, 2]})
    with pytest.raises(
        DgmrError, match=rf"no blocks 0 to 2; the student's are 0 to {len(prefixes) - 1}"
    ):
        learned(model, config, asked)


def test_what_the_loss_does_not_reach_is_not_learned():
    only = {"pooled": 0, "patch_tokens": 0, "blocks": 1}
    asked = tiny.features_config(blocks=[0])
    found = learned(skeleton("class token"), stage(loss=only), asked)
    assert any(name.startswith("blocks.0.") for name in found)
    assert not any(name.startswith(("blocks.1.", "norm.", "head.")) for name in found)
    # The pool head of SigLIP is behind the patch tokens.
    tokens = learned(skeleton("attention pool"), stage(loss={"pooled": 0}), asked)
    whole = learned(skeleton("attention pool"), stage(), asked)
    assert {name.split(".")[0] for name in whole - tokens} == {"attn_pool"}


def test_a_stage_that_trains_nothing_is_refused():
    only = {"pooled": 0, "patch_tokens": 0, "blocks": 1}
    config = stage(train={"blocks": [1, 1]}, loss=only)
    with pytest.raises(
        DgmrError, match="no parameter that it names has a part in the stage's loss"
    ):
        learned(skeleton("class token"), config, tiny.features_config(blocks=[0]))
