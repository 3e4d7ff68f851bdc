"""params.yaml: what is allowed, and the sentence on what is not."""

import contextlib
import copy
import itertools
import json
import math
import re
import subprocess
import sys
import typing
from datetime import date
from pathlib import Path

import jsonschema
import pytest
import yaml
from dgmr import params
from dgmr.errors import DgmrError
from pydantic import BaseModel

REPOSITORY = Path(__file__).parents[1]
DEFAULT = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


def changed(path, value):
    """The default file with the value at a dotted path replaced; ``...`` removes the key."""
    values = copy.deepcopy(DEFAULT)
    *sections, last = path.split(".")
    place = values
    for section in sections:
        place = place[section]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


def refusal(values):
    with pytest.raises(DgmrError) as error:
        params.validate(values, "my.yaml")
    sentence = str(error.value)
    assert sentence.startswith("my.yaml: ") and sentence.endswith(".")
    assert "\n" not in sentence, "one wrong key must give one sentence"
    assert "pydantic" not in sentence
    return sentence


STAGE = DEFAULT["distill"]["stages"]["mlp"]


# Ways to give the widths; the default file has one, and these as comments.
OTHER_WIDTHS = ("keep", "hidden_features", "budget")

# Sections that are null in the default file, whose comment there names their keys.
NULL = {
    "features.views.color_jitter": params.ColorJitter,
    "distill.stages.mlp.prune": params.StagePrune,
}


def test_default_file_is_valid():
    found = params.read(REPOSITORY / "params.yaml").model_dump(mode="json")
    for name in OTHER_WIDTHS:
        assert found["prune"].pop(name) is None
    short = DEFAULT["distill"]["stages"]["all"]
    full = {name: field.default for name, field in params.Stage.model_fields.items()}
    full |= {"loss": params.LossWeights().model_dump(), "betas": [0.9, 0.999]} | short
    assert found["distill"]["stages"]["all"] == full
    assert found == changed("distill.stages.all", full)  # every other key is there, none is coerced


def test_later_stages_of_the_default_file_say_only_what_is_no_default():
    for name, value in DEFAULT["distill"]["stages"]["all"].items():
        assert params.Stage.model_fields[name].default != value


def test_keys_of_null_sections_stand_in_the_comment():
    lines = (REPOSITORY / "params.yaml").read_text().splitlines()
    for path, kind in NULL.items():
        (line,) = [
            each for each in lines if each.strip().startswith(f"{path.split('.')[-1]}: null")
        ]
        comment = line.partition("#")[2]
        assert [key for key in kind.model_fields if key not in comment] == []


def test_other_widths_stand_in_the_default_file_as_comments():
    lines = (REPOSITORY / "params.yaml").read_text().splitlines()
    for name in OTHER_WIDTHS:
        (line,) = [line for line in lines if line.startswith(f"  # {name}: ")]
        value = yaml.safe_load(line.replace("# ", "", 1))[name]
        prune = {key: v for key, v in DEFAULT["prune"].items() if key != "ratio"}
        assert params.validate(DEFAULT | {"prune": prune | {name: value}})


@pytest.mark.parametrize("given", [{}, {"ratio": 1.0, "keep": 0.5}, {"keep": 0.5, "budget": 0.5}])
def test_widths_are_given_in_exactly_one_way(given):
    prune = {key: value for key, value in DEFAULT["prune"].items() if key != "ratio"}
    sentence = refusal(DEFAULT | {"prune": prune | given})
    assert "prune needs exactly one of ratio, keep, hidden_features, budget" in sentence
    assert f"({', '.join(given) or 'none'} given)" in sentence


def test_sequential_refits_need_refits():
    sentence = refusal(
        changed("prune", DEFAULT["prune"] | {"sequential": True, "compensate": "none"})
    )
    assert "prune.sequential needs prune.compensate: least_squares" in sentence


def test_refits_need_images_to_hold_out():
    few = changed("features.calibration.samples", 7)
    assert "features.calibration.samples must be at least 8" in refusal(few)
    params.validate(changed("features.calibration.samples", 8))
    few["prune"]["compensate"] = "none"
    params.validate(few)


@pytest.mark.parametrize(
    ("path", "guess"),
    [
        ("teachr", "teacher"),
        ("data.n_sample", "n_samples"),
        ("data.filters.min_sides", "min_side"),
        ("data.eval.sorce", "source"),
        ("features.views.crop_scales", "crop_scale"),
        ("distill.stage", "stages"),
        ("distill.stages.mlp.batchsize", "batch_size"),
        ("distill.stages.mlp.loss.patch_token", "patch_tokens"),
        ("distill.stages.mlp.emas", "ema"),
        ("distill.checkpoint_every", "checkpoint_every_s"),
        ("features.block", "blocks"),
        ("features.views.greyscale", "grayscale"),
    ],
)
def test_unknown_key_is_refused_with_a_guess(path, guess):
    sentence = refusal(changed(path, 1))
    assert f"unknown key {path} (did you mean {guess}?)" in sentence
    allowed = sentence.partition("allowed here: ")[2].rstrip(".").split(", ")
    *sections, _ = path.split(".")
    beside = DEFAULT
    for section in sections:
        beside = beside[section]
    assert sorted(allowed) == sorted(beside)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (
            "features.views.color_jitter",
            {"hues": 0.1},
            "unknown key features.views.color_jitter.hues (did you mean hue?); allowed here:"
            " probability, brightness, contrast, saturation, hue.",
        ),
        (
            "distill.stages.mlp.prune",
            {"ratio": 1.0, "block": [0, 1]},
            "unknown key distill.stages.mlp.prune.block (did you mean blocks?); allowed here: ratio,"
            " blocks.",
        ),
        (
            "distill.stages.mlp.train",
            {"blocks": [0, 1], "bloks": 1},
            "unknown key distill.stages.mlp.train.bloks (did you mean blocks?); allowed here: blocks.",
        ),
    ],
)
def test_unknown_key_in_a_section_that_may_be_null_or_a_name(path, value, says):
    assert refusal(changed(path, value)) == f"my.yaml: {says}"


def test_unknown_key_like_no_other_gets_no_guess():
    assert "did you mean" not in refusal(changed("data.zzz", 1))


@pytest.mark.parametrize("name", ["train", "seed", "loss", "stages"])
def test_stage_may_have_the_name_of_a_key(name):
    assert params.validate(changed(f"distill.stages.{name}", STAGE))
    sentence = refusal(changed(f"distill.stages.{name}", STAGE | {"sampels": 1}))
    assert f"distill.stages.{name}.sampels (did you mean samples?)" in sentence


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        # key, value, and what is allowed instead
        ("data.n_samples", "many", 'data.n_samples is "many": input should be a valid integer'),
        ("data.n_samples", 0, "data.n_samples is 0: input should be greater than or equal to 1"),
        ("data.n_samples", 1.5, "data.n_samples is 1.5: input should be a valid integer"),
        ("data.table", ["a", "b"], 'data.table is ["a", "b"]: input should be a valid string'),
        ("data.urls", "ftp", "data.urls is \"ftp\": input should be 'http' or 'file'"),
        ("data.filters.max_punsafe", 1.5, "max_punsafe is 1.5: input should be less than or equal"),
        ("data.filters.max_aspect_ratio", 0.5, "max_aspect_ratio is 0.5: input should be greater"),
        ("data.eval.source", "imagenet", "'fashion-mnist', 'imagefolder' or 'webdataset'"),
        ("features", None, "features is null: input should be a valid dictionary"),
        (
            "features.cache",
            "memory",
            "features.cache is \"memory\": input should be 'disk' or 'none'",
        ),
        ("features.cache", None, "features.cache is null: input should be 'disk' or 'none'"),
        ("features.dtype", "int8", "features.dtype is \"int8\": input should be 'bfloat16' or"),
        ("features.dtype", "float16", "input should be 'bfloat16' or 'float32'"),
        ("features.precision", "float16", 'features.precision is "float16": input should be'),
        ("features.patch_tokens", 0, "features.patch_tokens is 0: input should be greater than"),
        ("features.patch_tokens", "all", 'patch_tokens is "all": input should be a valid integer'),
        ("features.blocks", [1, -1], "features.blocks.1 is -1: input should be greater than or"),
        ("features.blocks", 3, "features.blocks is 3: input should be a valid tuple"),
        ("features.blocks", None, "features.blocks is null: input should be a valid tuple"),
        ("features.pixels", "some", 'features.pixels is "some": input should be a valid boolean'),
        ("features.batch_size", 0, "features.batch_size is 0: input should be greater than or"),
        ("features.views.count", 0, "features.views.count is 0: input should be greater than or"),
        ("features.views.grayscale", 1.1, "grayscale is 1.1: input should be less than or equal"),
        ("features.views.blur", -0.1, "blur is -0.1: input should be greater than or equal to 0"),
        ("features.views.solarize", None, "solarize is null: input should be a valid number"),
        ("features.views.color_jitter", True, "color_jitter is true: input should be a valid dict"),
        (
            "features.views.color_jitter",
            {"hue": 0.6},
            "color_jitter.hue is 0.6: input should be less",
        ),
        ("features.views.color_jitter", {"probability": 2}, "color_jitter.probability is 2: input"),
        ("features.views.color_jitter", {"contrast": -1}, "color_jitter.contrast is -1: input"),
        ("features.views.flip", 2, "features.views.flip is 2: input should be less than or equal"),
        ("features.views.crop_scale", [0, 1], "crop_scale.0 is 0: input should be greater than 0"),
        ("features.views.crop_scale", [0.1, 0.5, 1], "tuple should have at most 2 items"),
        ("prune.ratio", 0, "prune.ratio is 0: input should be greater than 0"),
        ("prune.ratio", -1.0, "prune.ratio is -1.0: input should be greater than 0"),
        ("prune.ratio", math.nan, "prune.ratio is NaN"),
        ("prune.max_ratio", math.inf, "max_ratio is Infinity: input should be a finite number"),
        ("prune.method", "l2", "'output_gram_schmidt', 'magnitude', 'active_energy', 'taylor' or"),
        ("prune.keep", 1.5, "prune.keep is 1.5: input should be less than or equal to 1"),
        ("prune.budget", 0, "prune.budget is 0: input should be greater than 0"),
        ("prune.hidden_features", {}, "dictionary should have at least 1 item"),
        ("prune.hidden_features", {"a": 0}, "prune.hidden_features.a is 0: input should be"),
        ("prune.tokens", 0, "prune.tokens is 0: input should be greater than or equal to 1"),
        ("prune.round_to", 0, "prune.round_to is 0: input should be greater than or equal to 1"),
        ("prune.ridge", 0, "prune.ridge is 0: input should be greater than 0"),
        ("prune.compensate", "lsq", "'least_squares' or 'none'"),
        ("distill.stages", {}, "distill.stages is {}: dictionary should have at least 1 item"),
        ("distill.stages.mlp.train", "heads", 'distill.stages.mlp.train is "heads": input should'),
        (
            "distill.stages.mlp.train",
            None,
            "distill.stages.mlp.train is null: input should be 'mlp',",
        ),
        (
            "distill.stages.mlp.train",
            [0, 1],
            "stages.mlp.train is [0, 1]: input should be 'mlp', 'mlp",
        ),
        ("distill.stages.mlp.train", {}, "distill.stages.mlp.train.blocks is missing; it has no"),
        (
            "distill.stages.mlp.train",
            {"blocks": [3, 1]},
            "distill.stages.mlp.train.blocks: blocks must be [first, last], not [3, 1].",
        ),
        ("distill.stages.mlp.train", {"blocks": [-1, 1]}, "mlp.train.blocks.0 is -1: input should"),
        ("distill.stages.mlp.train", {"blocks": [0]}, "mlp.train.blocks.1 is missing"),
        (
            "distill.stages.mlp.train",
            {"blocks": 2},
            "train.blocks is 2: input should be a valid tup",
        ),
        ("distill.stages.mlp.prune", {}, "distill.stages.mlp.prune.ratio is missing; it has no"),
        (
            "distill.stages.mlp.prune",
            0.5,
            "distill.stages.mlp.prune is 0.5: input should be a valid",
        ),
        ("distill.stages.mlp.prune", {"ratio": 0}, "mlp.prune.ratio is 0: input should be greater"),
        (
            "distill.stages.mlp.prune",
            {"ratio": 1, "blocks": [2, 0]},
            "distill.stages.mlp.prune.blocks: blocks must be [first, last], not [2, 0].",
        ),
        (
            "distill.stages.mlp.loss.blocks",
            -1,
            "loss.blocks is -1: input should be greater than or",
        ),
        (
            "distill.stages.mlp.accumulate",
            0,
            "mlp.accumulate is 0: input should be greater than or",
        ),
        (
            "distill.stages.mlp.grad_checkpointing",
            None,
            "grad_checkpointing is null: input should be",
        ),
        ("distill.stages.mlp.betas", [0.9, 1], "mlp.betas.1 is 1: input should be less than 1"),
        ("distill.stages.mlp.betas", [0.9], "distill.stages.mlp.betas.1 is missing"),
        ("distill.stages.mlp.end_weight_decay", -1, "mlp.end_weight_decay is -1: input should be"),
        ("distill.stages.mlp.clip_grad", 0, "mlp.clip_grad is 0: input should be greater than 0"),
        ("distill.stages.mlp.ema", 1, "distill.stages.mlp.ema is 1: input should be less than 1"),
        (
            "distill.stages.mlp.ema",
            0,
            "distill.stages.mlp.ema is 0: input should be greater than 0",
        ),
        ("distill.stages.mlp.precision", "float16", "input should be 'float32' or 'bfloat16'"),
        (
            "distill.max_bad_steps",
            -1,
            "distill.max_bad_steps is -1: input should be greater than or",
        ),
        ("distill.checkpoint_every_s", -1, "distill.checkpoint_every_s is -1: input should be"),
        (
            "distill.checkpoint_every_s",
            0.5,
            "checkpoint_every_s is 0.5: input should be a valid int",
        ),
        (
            "distill.processes",
            0,
            "distill.processes is 0: input should be greater than or equal to 1",
        ),
        (
            "distill.workers",
            -1,
            "distill.workers is -1: input should be greater than or equal to 0",
        ),
        ("distill.shard_above", -1, "distill.shard_above is -1: input should be greater than or"),
        ("distill.stages.mlp.lr", 0, "distill.stages.mlp.lr is 0: input should be greater than 0"),
        ("teacher.model", "", 'teacher.model is "": string should have at least 1 character'),
        ("mlflow.experiment", 3, "mlflow.experiment is 3: input should be a valid string"),
    ],
)
def test_wrong_value_is_refused(path, value, says):
    assert says in refusal(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("features.cache", "none"),
        ("features.patch_tokens", 3),
        ("features.blocks", [0, 5]),
        ("features.blocks", []),
        ("features.dtype", "float32"),
        ("features.pixels", False),
        ("features.precision", "bfloat16"),
        ("features.views.grayscale", 1.0),
        ("features.views.blur", 0.5),
        ("features.views.solarize", 0.2),
        ("features.views.color_jitter", {"probability": 0.0, "brightness": 1.0, "hue": 0.5}),
        ("distill.stages.mlp.train", "mlp+norm"),
        ("distill.stages.mlp.train", {"blocks": [0, 0]}),
        ("distill.stages.mlp.train", {"blocks": [1, 3]}),
        ("distill.stages.mlp.prune", {"ratio": 0.5}),
        ("distill.stages.mlp.prune", {"ratio": 2.0, "blocks": [1, 3]}),
        ("distill.stages.mlp.accumulate", 4),
        ("distill.stages.mlp.grad_checkpointing", True),
        ("distill.stages.mlp.betas", [0, 0.95]),
        ("distill.stages.mlp.decay_all", True),
        ("distill.stages.mlp.end_weight_decay", 0.4),
        ("distill.stages.mlp.clip_grad", None),
        ("distill.stages.mlp.ema", 0.9999),
        ("distill.stages.mlp.precision", "bfloat16"),
        ("distill.max_bad_steps", 0),
        ("distill.checkpoint_every_s", 0),
        ("distill.processes", 8),
        ("distill.workers", 0),
        ("distill.shard_above", 0),
    ],
    ids=str,
)
def test_allowed_value_is_taken_and_reaches_a_command_line(path, value):
    found = params.validate(changed(path, value))
    section, *rest = path.split(".")
    given = getattr(found, section).model_dump_json()
    kind = type(getattr(found, section))
    again = params.section(kind, given)
    assert again == getattr(found, section)
    place = again.model_dump(mode="json")
    for key in rest:
        place = place[key]
    if isinstance(value, dict):  # the others take their defaults
        place = {key: place[key] for key in value}
    assert place == value


def test_defaults_of_the_colours_are_dinov2s():
    found = params.validate(changed("features.views.color_jitter", {})).features.views
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    assert found.color_jitter.model_dump() == {"probability": 0.8} | strengths


@pytest.mark.parametrize(
    "path", ["teacher", "teacher.model", "data.n_samples", "distill.stages.all.lr"]
)
def test_missing_key_without_default_is_refused(path):
    assert refusal(changed(path, ...)) == f"my.yaml: {path} is missing; it has no default."


@pytest.mark.parametrize("name", ["teacher", "pruned", "student", "speed"])
def test_reserved_stage_name_is_refused(name):
    sentence = refusal(changed(f"distill.stages.{name}", STAGE))
    assert f"distill.stages.{name}: choose another name" in sentence
    assert "teacher, pruned, student, speed are taken" in sentence


@pytest.mark.parametrize("name", ["MLP", "1st", "a b", "a/b", ""])
def test_stage_name_that_is_no_file_name_is_refused(name):
    sentence = refusal(changed("distill.stages", {name: STAGE}))
    assert sentence.startswith(f"my.yaml: distill.stages.{name} is {json.dumps(name)}: ")
    assert "'^[a-z][a-z0-9_-]*$'" in sentence


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"table": "t.parquet"}, "source is fashion-mnist, table is t.parquet"),
        ({"source": "table"}, "source is table, table is None"),
    ],
)
def test_table_goes_with_its_source(changes, says):
    sentence = refusal(DEFAULT | {"data": DEFAULT["data"] | changes})
    assert "data.table must be given for data.source: table, and only for it" in sentence
    assert says in sentence


def test_fashion_mnist_comes_from_files():
    sentence = refusal(changed("data.urls", "http"))
    assert "data.urls must be file for data.source: fashion-mnist, not http" in sentence


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"path": "photos"}, "source is fashion-mnist, path is photos"),
        ({"source": "imagefolder"}, "source is imagefolder, path is None"),
        ({"source": "webdataset"}, "source is webdataset, path is None"),
    ],
)
def test_evaluation_path_goes_with_its_source(changes, says):
    sentence = refusal(changed("data.eval", DEFAULT["data"]["eval"] | changes))
    assert "data.eval.path must be given for the sources imagefolder and webdataset" in sentence
    assert says in sentence


def test_ratio_beyond_the_orders_is_refused():
    sentence = refusal(changed("prune.ratio", 2.5))
    assert "prune.ratio 2.5 must not exceed prune.max_ratio 2.0" in sentence
    assert params.validate(changed("prune.ratio", 2.0)).prune.ratio == 2.0


def test_crop_scale_is_ordered():
    sentence = refusal(changed("features.views.crop_scale", [0.9, 0.2]))
    assert "features.views.crop_scale must be [smallest, largest], not [0.9, 0.2]" in sentence


def test_stage_has_at_least_one_step():
    sentence = refusal(changed("distill.stages.mlp.samples", 63))
    assert "distill.stages.mlp: samples 63 must be at least one batch_size 64" in sentence
    assert params.validate(changed("distill.stages.mlp.samples", 64))


def test_a_decay_that_changes_has_something_to_change():
    values = changed("distill.stages.mlp.end_weight_decay", 0.4)
    assert params.validate(values)
    values["distill"]["stages"]["mlp"]["weight_decay"] = 0
    assert refusal(values) == (
        "my.yaml: distill.stages.mlp: end_weight_decay needs a weight_decay above 0 to begin with."
    )
    values["distill"]["stages"]["mlp"]["end_weight_decay"] = None
    assert params.validate(values)


def test_loss_has_a_term():
    none = {"pooled": 0, "patch_tokens": 0}
    sentence = refusal(changed("distill.stages.all.loss", none))
    wanted = "distill.stages.all.loss: loss: pooled, patch_tokens and blocks must not all be 0"
    assert wanted in sentence
    assert params.validate(changed("distill.stages.all.loss", {"pooled": 0}))
    values = changed("distill.stages.all.loss", none | {"blocks": 0.5})
    values["features"]["blocks"] = [1]
    assert params.validate(values)


# What one section wants of another


def test_a_loss_on_patch_tokens_asks_for_them():
    values = changed("features.patch_tokens", None)
    assert refusal(values) == (
        "my.yaml: distill.stages.mlp.loss.patch_tokens is 1, but features.patch_tokens is null: ask"
        " for them, or give the loss a weight of 0."
    )
    values["distill"]["stages"]["mlp"]["loss"]["patch_tokens"] = 0
    assert "distill.stages.all.loss.patch_tokens is 1, but" in refusal(values)  # its default
    values["distill"]["stages"]["all"]["loss"] = {"patch_tokens": 0}
    assert params.validate(values)


def test_a_loss_on_blocks_asks_for_some():
    values = changed("distill.stages.all.loss", {"blocks": 0.25})
    assert refusal(values) == (
        "my.yaml: distill.stages.all.loss.blocks is 0.25, but features.blocks names none: name some,"
        " or give the loss a weight of 0."
    )
    values["features"]["blocks"] = [2]
    assert params.validate(values)


def test_what_is_asked_for_need_not_be_in_the_loss():
    assert params.validate(changed("features.blocks", [2]))


def test_a_stage_prunes_within_the_orders():
    values = changed("distill.stages.all.prune", {"ratio": 2.5})
    assert refusal(values) == (
        "my.yaml: distill.stages.all.prune.ratio 2.5 must not exceed prune.max_ratio 2."
    )
    values["prune"]["max_ratio"] = 2.5
    assert params.validate(values)


# A sweep: values to try

RATIOS, METHODS = [2, 1, 0.5], ["gram_schmidt", "magnitude"]


def swept(**values):
    """The default file with a sweep; ``__`` stands for a dot."""
    return DEFAULT | {"sweep": {name.replace("__", "."): v for name, v in values.items()}}


def test_points_are_the_combinations_in_order_by_names_that_tell_them():
    points = params.validate(swept(prune__ratio=RATIOS, prune__method=METHODS)).points()
    assert list(points) == [
        f"ratio-{ratio}_method-{method}"
        for ratio in RATIOS
        for method in ("gram-schmidt", "magnitude")
    ]
    whole = params.validate(DEFAULT)
    for point, (ratio, method) in zip(
        points.values(), itertools.product(RATIOS, METHODS), strict=True
    ):
        assert point == params.validate(
            DEFAULT | {"prune": DEFAULT["prune"] | {"ratio": ratio, "method": method}}
        )
        assert point.mlflow == whole.mlflow and not point.sweep
    assert whole.points() == {}


def test_values_of_a_stage_may_be_lists_mappings_and_null():
    values = swept(
        distill__stages__all__train=["all", {"blocks": [1, 3]}],
        distill__stages__all__ema=[None, 0.99],
        distill__stages__all__loss__pooled=[0.5],
    )
    points = params.validate(values).points()
    assert list(points) == [
        "all.train-all_all.ema-null_all.loss.pooled-0.5",
        "all.train-all_all.ema-0.99_all.loss.pooled-0.5",
        "all.train-blocks-1-3_all.ema-null_all.loss.pooled-0.5",
        "all.train-blocks-1-3_all.ema-0.99_all.loss.pooled-0.5",
    ]
    stage = list(points.values())[-1].distill.stages["all"]
    assert stage.train.blocks == (1, 3) and stage.ema == 0.99
    assert stage.loss == params.LossWeights(pooled=0.5)
    keys = ["distill.stages.all.train", "distill.stages.all.loss.pooled", "prune.ratio"]
    assert list(points.values())[-1].values(keys) == {
        keys[0]: {"blocks": [1, 3]},
        keys[1]: 0.5,
        keys[2]: 1.0,
    }


def test_a_key_within_a_value_that_is_swept_too_leaves_the_value_as_it_is():
    loss = {"pooled": 3.0}
    values = swept(distill__stages__all__loss=[loss], distill__stages__all__loss__pooled=[1, 2])
    for _ in range(2):
        points = params.validate(values).points()
        assert [p.distill.stages["all"].loss.pooled for p in points.values()] == [1, 2]
    assert loss == {"pooled": 3.0}


def test_width_may_be_given_in_other_ways():
    widths = [{"blocks.0.mlp": 48}, {f"blocks.{i}.mlp": 96 for i in range(30)}]
    widths.append(widths[1] | {"blocks.29.mlp": 48})
    found = params.validate(swept(prune__ratio=[None], prune__hidden_features=widths))
    names = list(found.points())
    assert names[0] == "ratio-null_hidden_features-blocks.0.mlp-48"
    assert [p.prune.hidden_features for p in found.points().values()] == widths
    # Long ones are cut to what a file system takes, and told apart by their hash.
    assert len(set(names)) == 3 and all(len(name) <= 100 for name in names)
    assert all(re.fullmatch(r"[\w.+-]+", name) for name in names)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prune__ratoi": [1]}, "sweep (prune.ratoi: 1): unknown key prune.ratoi (did you mean ra"),
        (
            {"distill__stages__all__loss__pooledd": [1]},
            "unknown key distill.stages.all.loss.pooledd (did you mean pooled?)",
        ),
        ({"data__seed": [1]}, "sweep.data.seed: what can be swept are the keys of prune and of"),
        ({"prune": [{}]}, "sweep.prune: what can be swept are the keys of prune and of distill.st"),
        ({"evaluate__batch_size": [1]}, "sweep.evaluate.batch_size: what can be swept are"),
        ({"distill__processes": [1]}, "sweep.distill.processes: what can be swept are"),
        ({"distill__stages": [{}]}, "sweep.distill.stages: what can be swept are"),
        ({"distill__stages__new": [STAGE]}, "sweep.distill.stages.new: what can be swept are"),
        ({"distill__stages__all": [STAGE]}, "sweep.distill.stages.all: what can be swept are"),
        ({"distill__stages__new__lr": [1]}, "sweep.distill.stages.new.lr: what can be swept are"),
        (
            {"distill__stages__all__prune__ratio": [1]},
            "of a section that is null the whole.",
        ),
        ({"prune__ratio": []}, "sweep.prune.ratio is []: tuple should have at least 1 item"),
        ({"prune__ratio": 2}, "sweep.prune.ratio is 2: input should be a valid tuple"),
        (
            {"prune__ratio": [1, 2.5]},
            "sweep (prune.ratio: 2.5): prune: prune.ratio 2.5 must not exceed prune.max_ratio 2.0",
        ),
        (
            {"prune__method": METHODS, "prune__keep": [0.5]},
            "sweep (prune.method: gram_schmidt, prune.keep: 0.5): prune: prune needs exactly one of",
        ),
        ({"prune__ratio": [math.nan]}, "sweep (prune.ratio: NaN): prune.ratio is NaN: input"),
        ({"prune__ratio": [date(2026, 1, 1)]}, 'prune.ratio is "2026-01-01": input should be a'),
        ({"prune__ratio": [1, 2, 1]}, "sweep: two points would be called ratio-1: give each value"),
        ({"prune__ratio": [1, "1"]}, "sweep: two points would be called ratio-1: give each value"),
        (
            {"prune__ratio": [2, 1, 2.0]},
            "sweep: the points ratio-2 and ratio-2.0 are the same run: give each value once.",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_refused(values, says):
    assert says in refusal(swept(**values))


def test_sweep_is_a_mapping():
    assert "sweep is null: input should be a valid dictionary" in refusal(DEFAULT | {"sweep": None})


def test_what_is_wrong_without_a_sweep_is_not_blamed_on_it():
    values = changed("features.patch_tokens", None) | {"sweep": {"prune.ratio": RATIOS}}
    assert refusal(values).startswith("my.yaml: distill.stages.mlp.loss.patch_tokens is 1, but")


def test_sweep_of_the_default_file_s_comment_is_allowed():
    lines = (REPOSITORY / "params.yaml").read_text().splitlines()
    start = lines.index("sweep: {}")
    example = [line.removeprefix("#") for line in lines[start + 1 :] if line.startswith("#  ")]
    values = yaml.safe_load("\n".join(["sweep:", *example]))
    assert len(params.validate(DEFAULT | values).points()) == 3 * 2 * 2


def test_a_sweep_does_not_shape_the_run_itself():
    assert (
        params.validate(swept(prune__ratio=RATIOS)).shaping() == params.validate(DEFAULT).shaping()
    )


# What shapes the results


@pytest.mark.parametrize("name", sorted(set(params.Distill.model_fields) - {"stages"}))
def test_how_stages_are_run_shapes_nothing(name):
    before = params.validate(DEFAULT).shaping()
    assert name not in before["distill"]
    assert params.validate(changed(f"distill.{name}", 7)).shaping() == before


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("features.views.blur", 0.5),
        ("features.cache", "none"),
        ("features.blocks", [1]),
        ("prune.ridge", 0.1),
        ("distill.stages.mlp.train", {"blocks": [0, 1]}),
        ("distill.stages.all.ema", 0.9),
        ("distill.stages.all.prune", {"ratio": 0.5}),
        ("evaluate.batch_size", 1),
    ],
    ids=str,
)
def test_everything_else_shapes_the_results(path, value):
    found = params.validate(changed(path, value)).shaping()
    assert found != params.validate(DEFAULT).shaping()
    assert json.loads(json.dumps(found)) == found


def test_order_of_stages_is_kept():
    values = changed("distill.stages", dict(reversed(DEFAULT["distill"]["stages"].items())))
    assert list(params.validate(values).shaping()["distill"]["stages"]) == ["all", "mlp"]


def test_each_wrong_key_has_its_own_line():
    values = changed("prune.ratio", 0) | {"reports": {}, "mlflow": {"experiment": 3}}
    with pytest.raises(DgmrError) as error:
        params.validate(values)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all(line.startswith("params.yaml: ") for line in lines)


def test_numbers_as_yaml_1_1_reads_them():
    values = changed("distill.stages.mlp.lr", yaml.safe_load("1e-3"))  # a string, for YAML 1.1
    assert params.validate(values).distill.stages["mlp"].lr == 0.001


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "cannot be read as YAML"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        (b"- 1", "must be a mapping of sections (teacher, data, "),
        (b"", "must be a mapping of sections"),
        (None, "No such file"),
    ],
)
def test_unreadable_file_is_named(tmp_path, content, says):
    path = tmp_path / "p.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DgmrError, match=re.escape(str(path))) as error:
        params.read(path)
    assert says in str(error.value)


def test_section_from_json_and_from_a_file():
    whole = params.validate(DEFAULT)
    assert params.section(params.Data, whole.data.model_dump_json()) == whole.data
    file = str(REPOSITORY / "params.yaml")
    assert params.section(params.Prune, file) == whole.prune
    assert params.section(params.Params, file) == whole


def test_section_partly_dumped_as_rules_do_takes_defaults():
    dumped = params.validate(DEFAULT).data.model_dump_json(exclude={"eval", "download"})
    assert params.section(params.Data, dumped).eval == params.EvaluationData()


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (
            params.Stage,
            '{"train": "mlp", "samples": 64, "lrr": 1}',
            "unknown key lrr (did you mean lr",
        ),
        (
            params.Teacher,
            '{"model": 3}',
            "teacher config: model is 3: input should be a valid string",
        ),
        (params.Prune, "{", 'prune config: its text is "{": invalid JSON'),
        (params.Stage, str(REPOSITORY / "params.yaml"), "a Stage must be given as JSON"),
        (params.Prune, "nowhere.yaml", "nowhere.yaml cannot be read"),
    ],
)
def test_wrong_section_is_refused(kind, text, says):
    with pytest.raises(DgmrError) as error:
        params.section(kind, text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("n_samples", "shard_size", "per_job", "jobs"),
    [
        (5, 2, 2, {"00000": ["00000", "00001"], "00001": ["00002"]}),
        (4, 2, 2, {"00000": ["00000", "00001"]}),
        (1, 1000, 10, {"00000": ["00000"]}),
        (3, 1, 1, {"00000": ["00000"], "00001": ["00001"], "00002": ["00002"]}),
    ],
)
def test_jobs_share_out_all_shards(n_samples, shard_size, per_job, jobs):
    sizes = {"n_samples": n_samples, "shard_size": shard_size, "shards_per_job": per_job}
    data = params.Data.model_validate({"urls": "file"} | sizes)
    assert data.jobs == jobs
    assert data.shards == [shard for shards in jobs.values() for shard in shards]


def test_values_stay_as_they_were_read():
    found = params.validate(DEFAULT)
    with pytest.raises(ValueError, match="frozen"):
        found.prune.ratio = 2.0


def test_import_is_cheap():
    heavy = [
        "torch",
        "timm",
        "torchvision",
        "pyarrow",
        "numpy",
        "PIL",
        "webdataset",
        "mlflow",
        "snakemake",
    ]
    script = (
        "import sys, dgmr.params, dgmr.fingerprint, dgmr.cli;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(REPOSITORY / "workflow")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_schema_file_is_that_of_the_models():
    written = json.loads((REPOSITORY / "workflow" / "schemas" / "params.schema.json").read_text())
    assert written == params.schema(), "params.py has changed: run make schema"


@pytest.mark.parametrize(
    ("train", "allowed"),
    [
        ("mlp", True),
        ({"blocks": [0, 3]}, True),
        ("heads", False),
        (None, False),
        ([0, 3], False),
        ({"blocks": [0]}, False),
        ({"blocks": [-1, 3]}, False),
        ({"bloks": [0, 3]}, False),
        ({"blocks": [0, 3], "norms": True}, False),
    ],
    ids=str,
)
def test_an_editor_allows_the_same_as_the_workflow(train, allowed):
    values = changed("distill.stages.mlp.train", train)
    assert jsonschema.Draft202012Validator(params.schema()).is_valid(values) == allowed
    with contextlib.nullcontext() if allowed else pytest.raises(DgmrError):
        params.validate(values)


def leaves(kind, values, path=""):
    """Dotted path, field, and what params.yaml has there (``...``: nothing) of every knob."""
    for name, field in kind.model_fields.items():
        below = values.get(name, ...) if isinstance(values, dict) else ...
        inner = [field.annotation, *typing.get_args(field.annotation)]
        sections = [k for k in inner if isinstance(k, type) and issubclass(k, BaseModel)]
        if not sections:
            yield f"{path}{name}", field, below
        elif typing.get_origin(field.annotation) is dict:
            for key in below:
                yield from leaves(sections[0], below[key], f"{path}{name}.{key}.")
        else:
            yield from leaves(sections[0], below, f"{path}{name}.")


def test_every_knob_is_described_and_stands_in_the_default_file():
    knobs = {path: (field, value) for path, field, value in leaves(params.Params, DEFAULT)}
    assert {"teacher.model", "data.eval.n_samples", "distill.stages.mlp.loss.pooled"} <= set(knobs)
    # A stage after the first says only what is no default.
    missing = {p for p, (_, value) in knobs.items() if value is ... and ".stages.all." not in p}
    as_comments = {f"prune.{name}" for name in OTHER_WIDTHS}
    as_comments |= {f"{path}.{key}" for path, kind in NULL.items() for key in kind.model_fields}
    assert missing == as_comments
    assert [path for path, (field, _) in knobs.items() if not field.description] == []


def test_every_section_is_described():
    kinds = params.schema()["$defs"]
    assert len(kinds) > 10
    assert [name for name, kind in kinds.items() if not kind.get("description")] == []
