"""params.yaml: what is allowed, and the sentence on what is not."""

import copy
import json
import math
import re
import subprocess
import sys
import typing
from pathlib import Path

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


def test_default_file_is_valid():
    found = params.read(REPOSITORY / "params.yaml").model_dump(mode="json")
    for name in OTHER_WIDTHS:
        assert found["prune"].pop(name) is None
    assert found == DEFAULT  # every other key is there, none is coerced


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
        ("distill.stages.all.loss.patch_token", "patch_tokens"),
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
        ("features.dtype", "int8", "'bfloat16', 'float16' or 'float32'"),
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
        ("distill.stages.mlp.lr", 0, "distill.stages.mlp.lr is 0: input should be greater than 0"),
        ("teacher.model", "", 'teacher.model is "": string should have at least 1 character'),
        ("mlflow.experiment", 3, "mlflow.experiment is 3: input should be a valid string"),
    ],
)
def test_wrong_value_is_refused(path, value, says):
    assert says in refusal(changed(path, value))


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


def test_loss_has_a_term():
    sentence = refusal(changed("distill.stages.all.loss", {"pooled": 0, "patch_tokens": 0}))
    assert "distill.stages.all.loss" in sentence and "must not both be 0" in sentence
    assert params.validate(changed("distill.stages.all.loss", {"pooled": 0}))


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
    assert {"teacher.model", "data.eval.n_samples", "distill.stages.all.loss.pooled"} <= set(knobs)
    missing = [path for path, (_, value) in knobs.items() if value is ...]
    assert missing == [f"prune.{name}" for name in OTHER_WIDTHS]
    assert [path for path, (field, _) in knobs.items() if not field.description] == []


def test_every_section_is_described():
    kinds = params.schema()["$defs"]
    assert len(kinds) > 10
    assert [name for name, kind in kinds.items() if not kind.get("description")] == []
