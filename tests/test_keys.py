"""A key changes with all that shapes its result, and with nothing else."""

import copy
import os

import pytest
from dgmr import fingerprint, keys, params
from dgmr.errors import DgmrError
from dgmr.keys import Keys

STAGE = {"train": "mlp", "samples": 640, "lr": 1e-3}
BASE = {
    "teacher": {"model": "local-dir:teacher"},
    "data": {"source": "table", "table": "table/*.parquet", "urls": "file", "n_samples": 300},
    "prune": {"ratio": 1.0},
    "distill": {"stages": {"mlp": STAGE, "all": STAGE | {"train": "all"}}},
}

REPORT = {"report"}
EVALUATE = {"evaluate", *REPORT}
ALL_STAGE = {"distill all", "evaluation all", "speed", *EVALUATE}
MLP_STAGE = {"distill mlp", "evaluation mlp", *ALL_STAGE}
PRUNE = {"prune", "evaluation pruned", *MLP_STAGE}
REFITS = {"refits", *PRUNE}
ORDERS = {"orders", *REFITS}
CALIBRATION = {"calibration", "features", "saliency", *REFITS}
TARGETS = {"targets", "features", *MLP_STAGE}
SHARDS = {"shards", "data", *CALIBRATION, *TARGETS}
SELECTION = {"selection", "downloads", *SHARDS}
EVALUATION_DATA = {
    "evaluation_data",
    *(f"evaluation {m}" for m in ("teacher", "pruned", "mlp", "all")),
}
EVALUATION_DATA |= EVALUATE
TEACHER = {"teacher", "evaluation teacher", *ORDERS, *CALIBRATION, *TARGETS}

# By dotted knob: another value, and what it changes besides the check.
KNOBS = {
    "teacher.model": ("vit_tiny_patch16_224", TEACHER),
    "teacher.checkpoint": ("teacher/config.json", TEACHER),
    "data.table": ("table/a.parquet", SELECTION),
    "data.n_samples": (200, SELECTION),
    "data.seed": (1, SELECTION),
    "data.filters.min_side": (10, SELECTION),
    "data.filters.max_aspect_ratio": (2.0, SELECTION),
    "data.filters.min_similarity": (0.1, SELECTION),
    "data.filters.max_punsafe": (0.1, SELECTION),
    "data.download.threads": (
        3,
        {"downloads", *REPORT},
    ),  # of URLs that are files, nothing is fetched
    "data.download.timeout_s": (3, {"downloads", *REPORT}),
    "data.download.retries": (3, {"downloads", *REPORT}),
    "data.image_size": (64, SHARDS),
    "data.shard_size": (100, {*SELECTION, "evaluation_shards", *EVALUATION_DATA}),
    "data.shards_per_job": (3, SELECTION),
    "data.eval.n_samples": (100, {"evaluation_shards", *EVALUATION_DATA}),
    "data.eval": (
        {"source": "imagefolder", "path": "images"},
        {"evaluation_shards", *EVALUATION_DATA},
    ),
    "features.cache": ("none", {*TARGETS} - {"targets"}),
    "features.views.count": (2, TARGETS),
    "features.views.seed": (1, TARGETS),
    "features.views.crop_scale": ([0.5, 1.0], TARGETS),
    "features.views.flip": (0.0, TARGETS),
    "features.views.color_jitter": ({"hue": 0.0}, TARGETS),
    "features.views.grayscale": (0.1, TARGETS),
    "features.views.blur": (0.1, TARGETS),
    "features.views.solarize": (0.1, TARGETS),
    "features.patch_tokens": (2, TARGETS),
    "features.blocks": ([0], TARGETS),
    "features.dtype": ("float32", TARGETS),
    "features.pixels": (False, TARGETS),
    "features.precision": ("bfloat16", TARGETS),
    "features.batch_size": (64, {*TARGETS, *CALIBRATION}),
    "features.calibration.samples": (64, CALIBRATION),
    "features.calibration.tokens": (8, CALIBRATION),
    "features.calibration.seed": (1, CALIBRATION),
    "prune.method": ("magnitude", ORDERS),
    "prune.seed": (1, {"saliency", *ORDERS}),
    "prune.tokens": (100, ORDERS),
    "prune.max_ratio": (3.0, ORDERS),
    "prune.parts": (2, REPORT),
    "prune.ratio": (0.5, REFITS),
    "prune.round_to": (8, REFITS),
    "prune.include_pool_head": (False, REFITS),
    "prune.compensate": ("none", REFITS),
    "prune.sequential": (True, REFITS),
    "prune.ridge": (0.1, REFITS),
    "distill.max_bad_steps": (0, set()),
    "distill.checkpoint_every_s": (1, set()),
    "distill.processes": (2, set()),
    "distill.workers": (1, set()),
    "distill.shard_above": (1, set()),
    "distill.stages.mlp.train": ("all", MLP_STAGE),
    "distill.stages.mlp.loss.pooled": (0.5, MLP_STAGE),
    "distill.stages.mlp.prune": ({"ratio": 0.5}, MLP_STAGE),
    "distill.stages.all.samples": (64, ALL_STAGE),
    "distill.stages.all.batch_size": (32, ALL_STAGE),
    "distill.stages.all.accumulate": (2, ALL_STAGE),
    "distill.stages.all.grad_checkpointing": (True, ALL_STAGE),
    "distill.stages.all.lr": (1e-4, ALL_STAGE),
    "distill.stages.all.min_lr": (1e-5, ALL_STAGE),
    "distill.stages.all.warmup": (0.2, ALL_STAGE),
    "distill.stages.all.betas": ([0.8, 0.99], ALL_STAGE),
    "distill.stages.all.weight_decay": (0.1, ALL_STAGE),
    "distill.stages.all.decay_all": (True, ALL_STAGE),
    "distill.stages.all.end_weight_decay": (0.1, ALL_STAGE),
    "distill.stages.all.clip_grad": (None, ALL_STAGE),
    "distill.stages.all.ema": (0.9, ALL_STAGE),
    "distill.stages.all.precision": ("bfloat16", ALL_STAGE),
    "distill.stages.all.seed": (3, ALL_STAGE),
    "evaluate.batch_size": (64, {*EVALUATION_DATA} - {"evaluation_data"}),
    "evaluate.speed_batch_size": (8, {"speed", *EVALUATE}),
    "evaluate.speed_repeats": (3, {"speed", *EVALUATE}),
    "mlflow.experiment": ("other", set()),
    "mlflow.tracking_uri": (None, set()),
    "sweep": ({"prune.ratio": [0.5]}, REPORT),
}
UNCHECKED = ("evaluate.", "mlflow.")
HOW = tuple(f"distill.{name}" for name in params.Running.model_fields)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a local teacher and two tables."""
    monkeypatch.chdir(tmp_path)
    for path in (
        "teacher/config.json",
        "teacher/model.safetensors",
        "table/a.parquet",
        "table/b.parquet",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    return tmp_path


def all_keys(values):
    found = Keys(params.validate(values))
    names = ["check", "teacher", "fashion_table", "selection", "downloads", "shards", "data"]
    names += ["evaluation_shards", "evaluation_data", "targets", "calibration", "features"]
    names += ["saliency", "orders", "refits", "prune", "speed", "evaluate", "report"]
    by_name = {name: getattr(found, name) for name in names}
    by_name |= {f"distill {stage}": found.distill(stage) for stage in ("mlp", "all")}
    return by_name | {f"evaluation {model}": found.evaluation(model) for model in found.models}


def changed(before, values=BASE):
    after = all_keys(values)
    return {name for name in after if after[name] != before[name]}


def with_value(knob, value):
    values = copy.deepcopy(BASE)
    *sections, last = knob.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return values


@pytest.mark.parametrize("knob", KNOBS)
def test_knob_changes_what_depends_on_it(place, knob):
    value, wanted = KNOBS[knob]
    found = changed(all_keys(BASE), with_value(knob, value))
    assert found - {"check"} == wanted
    assert ("check" in found) == (not knob.startswith((*UNCHECKED, *HOW)))


def leaves(kind, prefix=""):
    """Dotted names of all knobs."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, params.Section):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_table_has_every_knob():
    wanted = {*leaves(params.Params), *leaves(params.Stage)} - {"distill.stages"}
    known = {
        knob.replace("distill.stages.mlp.", "").replace("distill.stages.all.", "") for knob in KNOBS
    }
    known |= {"data.source", "data.urls", "data.eval.source", "data.eval.path"}  # these go together
    known |= {"prune.keep", "prune.hidden_features", "prune.budget"}  # instead of ratio
    assert {knob for knob in wanted if knob not in known and not knob.startswith("loss.")} == set()


def test_keys_are_twelve_hexadecimal_digits_and_all_differ(place):
    found = all_keys(BASE)
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in found.values())
    assert len(set(found.values())) == len(found)
    assert Keys(params.validate(BASE)).of_work() <= set(found.values())


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("teacher/model.safetensors", TEACHER),
        ("teacher/config.json", TEACHER),
        ("table/b.parquet", SELECTION),
    ],
)
def test_content_of_the_users_files_counts_and_not_their_time(place, path, wanted):
    before = all_keys(BASE)
    os.utime(place / path, (1, 1))
    assert changed(before) == set()
    content = (place / path).read_text()
    (place / path).write_text("other")
    found = changed(before)
    assert found - {"check"} == wanted - REPORT | {"report"}
    (place / path).write_text(content)
    assert changed(before) == set()


def test_evaluation_images_count(place):
    for name in ("a/0.jpg", "a/1.jpg", "b/0.jpg"):
        (place / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "images" / name).write_text(name)
    values = with_value("data.eval", {"source": "imagefolder", "path": "images"})
    before = all_keys(values)
    os.utime(place / "images/a/0.jpg", (1, 1))
    assert changed(before, values) == set()
    (place / "images/a/0.jpg").write_text("of another size")
    assert changed(before, values) == {"evaluation_shards", *EVALUATION_DATA}
    (place / "images/a/0.jpg").write_text("a/0.jpg")
    assert changed(before, values) == set()
    (place / "images/b/0.jpg").rename(place / "images/b/1.jpg")
    assert "evaluation_shards" in changed(before, values)


def test_evaluation_images_are_looked_at_once_for_a_sweep(place, monkeypatch):
    seen = []
    monkeypatch.setattr(keys, "listing", lambda folder: seen.append(folder) or "listed")
    values = with_value("data.eval", {"source": "imagefolder", "path": "images"})
    runs = Keys(params.validate(values | {"sweep": {"prune.ratio": [0.5, 2.0]}})).runs
    assert len(runs) == 3 and len({run.evaluation_shards for run in runs}) == 1
    assert len(seen) == 1


def test_evaluation_tars_count(place):
    values = with_value("data.eval", {"source": "webdataset", "path": "tars/*.tar"})
    nothing = all_keys(values)
    (place / "tars").mkdir()
    (place / "tars/0.tar").write_text("a")
    before = all_keys(values)
    assert before["evaluation_shards"] != nothing["evaluation_shards"]
    (place / "tars/0.tar").write_text("b")
    assert changed(before, values) == {"evaluation_shards", *EVALUATION_DATA}


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_versions_count_wherever_images_are_shown(place, monkeypatch, cache):
    values = with_value("features.cache", cache)
    before = all_keys(values)
    installed = fingerprint.versions
    monkeypatch.setattr(keys, "versions", lambda *names: installed(*names) | {"torchvision": "9"})
    assert changed(before, values) == {*TARGETS, *CALIBRATION}


def test_a_full_disk_costs_no_key(place, monkeypatch):
    before = all_keys(BASE)
    fingerprint.HASHES.unlink()

    def full(*_):
        raise DgmrError("full")

    monkeypatch.setattr(fingerprint, "write_json", full)
    assert changed(before) == set()


def test_new_table_counts(place):
    before = all_keys(BASE)
    (place / "table/c.parquet").write_text("c")
    assert "selection" in changed(before)


def test_files_are_read_once(place, monkeypatch):
    read = []
    monkeypatch.setattr(
        fingerprint, "sha256", lambda path: read.append(path.name) or path.read_text()
    )
    before = all_keys(BASE)
    assert sorted(read) == ["a.parquet", "b.parquet", "config.json", "model.safetensors"]
    assert changed(before) == set() and len(read) == 4
    fingerprint.HASHES.write_text("{")  # a damaged memory is no memory
    assert changed(before) == set() and len(read) == 8


def test_missing_teacher_still_has_keys(place):
    (place / "teacher/config.json").unlink()
    assert all_keys(BASE)["teacher"]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("distill_stage", MLP_STAGE),
        ("assemble", PRUNE),
        ("targets", TARGETS),
        ("evaluate_model", {*EVALUATION_DATA} - {"evaluation_data"}),
        ("report", REPORT),
    ],
)
def test_command_of_a_rule_counts(place, monkeypatch, rule, wanted):
    before = all_keys(BASE)
    original = fingerprint.command
    monkeypatch.setattr(keys, "command", lambda name: original(name) + " --x" * (name == rule))
    assert changed(before) == wanted


def test_every_rule_that_makes_something_has_its_command_known():
    for rule in (
        "teacher",
        "data",
        "targets",
        "order_blocks",
        "assemble",
        "distill_stage",
        "gather",
    ):
        assert "python -m dgmr" in fingerprint.command(rule)
    assert fingerprint.command("no such rule") == ""


def test_command_is_also_what_the_rule_puts_into_it():
    assert "--from img2dataset==" in fingerprint.command("download_images")
    assert "sequential-refits --data results/data" in fingerprint.command("refit_blocks")
    assert "mem_mb" not in fingerprint.command("refit_blocks")


def test_points_of_a_sweep_share_what_they_can(place):
    values = with_value("sweep", {"prune.ratio": [0.5, 2.0]})
    first, second = (Keys(point) for point in params.validate(values).points().values())
    main = Keys(params.validate(values))
    assert first.orders == second.orders == main.orders and first.targets == main.targets
    assert len({first.prune, second.prune, main.prune}) == 3
    assert first.evaluation("teacher") == main.evaluation("teacher")
