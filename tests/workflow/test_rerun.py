"""What a change reruns: exactly the jobs that depend on it, and no other."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

TRACKED = Counter(track=8, all=1)
REPORTED = TRACKED + Counter(report=1)


def evaluated(models):
    return REPORTED + Counter(evaluate_model=models, measure_speed=1)


DISTILLED = evaluated(3) + Counter(distill_stage=2)
PRUNED = DISTILLED + Counter(prune=1)
REFITTED = PRUNED + Counter(refit_blocks=2)
PUBLISHED = REFITTED + Counter(features=1)
CHECKED = Counter(check=1)
REDRAWN = PUBLISHED + Counter(data=1, targets=2, calibration=1)  # all images are others


def set_params(**changes):
    return lambda place: place.edit(**changes)


def append(text, path):
    def change(place):
        with (place / path).open("a") as file:
            file.write(text)

    return change


def touch(path):
    return lambda place: os.utime(place / path)


def remove(path):
    return lambda place: (place / path).unlink()


CASES = {
    "nothing": (lambda place: None, Counter()),
    "params.yaml touched": (touch("params.yaml"), Counter()),
    "params.yaml: comment and empty lines": (append("\n\n# a comment\n", "params.yaml"), Counter()),
    "params.yaml: a default written out": (set_params(prune__round_to=1), Counter()),
    "last stage's lr": (
        set_params(distill__stages__all__lr=5e-4),
        CHECKED + evaluated(1) + Counter(distill_stage=1),
    ),
    "first stage's lr": (
        set_params(distill__stages__mlp__lr=5e-4),
        CHECKED + evaluated(2) + Counter(distill_stage=2),
    ),
    "last stage's prune": (
        set_params(distill__stages__all__prune={"ratio": 0.5}),
        CHECKED + evaluated(1) + Counter(distill_stage=1, prune_again=1),
    ),
    "how stages are run": (
        set_params(
            distill__processes=2,
            distill__workers=1,
            distill__shard_above=0,
            distill__checkpoint_every_s=1,
            distill__max_bad_steps=0,
        ),
        Counter(),
    ),
    "prune.ratio": (set_params(prune__ratio=0.5), CHECKED + REFITTED),
    "prune.compensate: none": (set_params(prune__compensate="none"), CHECKED + PRUNED),
    "prune.max_ratio": (
        set_params(prune__max_ratio=3.0),
        CHECKED + REFITTED + Counter(order_blocks=2),
    ),
    "prune.method: output_gram_schmidt": (
        set_params(prune__method="output_gram_schmidt"),
        CHECKED + REFITTED + Counter(order_blocks=2),
    ),
    "prune.method: taylor": (
        set_params(prune__method="taylor"),
        CHECKED + REFITTED + Counter(order_blocks=2, saliency=1),
    ),
    "prune.sequential": (
        set_params(prune__sequential=True),
        CHECKED + PRUNED + Counter(refit_blocks=1),
    ),
    # Other jobs list the same blocks, whose files are there already.
    "prune.parts": (
        set_params(prune__parts=1),
        CHECKED + PRUNED + Counter(order_blocks=1, refit_blocks=1),
    ),
    "features.views.count": (
        set_params(features__views__count=1),
        CHECKED + PUBLISHED + Counter(targets=2),
    ),
    "features.blocks": (
        set_params(features__blocks=[0]),
        CHECKED + PUBLISHED + Counter(targets=2),
    ),
    "features.cache: none": (set_params(features__cache="none"), CHECKED + PUBLISHED),
    "features.calibration.samples": (
        set_params(features__calibration__samples=32),
        CHECKED + PUBLISHED + Counter(calibration=1),
    ),
    "data.seed": (
        set_params(data__seed=1),
        CHECKED + REDRAWN + Counter(select_samples=1, pack_shards=2),
    ),
    "data.image_size": (
        set_params(data__image_size=20),
        CHECKED + REDRAWN + Counter(pack_shards=2),
    ),
    "data.eval.n_samples": (
        set_params(data__eval__n_samples=100),
        CHECKED + REPORTED + Counter(pack_evaluation=1, evaluation_data=1, evaluate_model=4),
    ),
    "evaluate.batch_size": (
        set_params(evaluate__batch_size=64),
        REPORTED + Counter(evaluate_model=4),
    ),
    "evaluate.speed_repeats": (
        set_params(evaluate__speed_repeats=3),
        REPORTED + Counter(measure_speed=1),
    ),
    "mlflow.experiment": (set_params(mlflow__experiment="other"), TRACKED),
    "mlflow.tracking_uri: null": (set_params(mlflow__tracking_uri=None), Counter()),
    "a shard touched": (touch("results/data/00000.tar"), Counter()),
    "a shard changed": (
        append("?", "results/data/00000.tar"),
        PUBLISHED + Counter(targets=1, calibration=1) - Counter(track=2),  # teacher, data
    ),
    "the teacher touched": (touch("resources/teachers/micro/model.safetensors"), Counter()),
    "check.json touched": (touch("work/check.json"), Counter()),
    "check.json gone": (remove("work/check.json"), CHECKED + Counter(all=1)),
    "the page gone": (remove("results/report.html"), Counter(report=1, track=1, all=1)),
}


@pytest.fixture(scope="module")
def plans(finished, tmp_path_factory):
    """What each case plans, two at a time."""

    def plan(case):
        change, _ = case
        place = finished.copy(tmp_path_factory.mktemp("case") / "copy")
        change(place)
        found = place.planned()
        shutil.rmtree(place.folder)
        return found

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(plan, CASES.values()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_change_reruns_what_depends_on_it(plans, case):
    assert plans[case] == CASES[case][1]


def test_ratio_there_and_back_is_served_from_stored_orders(finished_copy):
    place = finished_copy.edit(mlflow__tracking_uri=None)
    order_files = sorted((place / "work/prune").glob("*/orders/*"))
    assert len(order_files) == 4  # a file for each of two blocks and of two parts
    stored = [path.stat().st_mtime_ns for path in order_files]
    first = (place / "results/prune/model.safetensors").read_bytes()

    place.edit(prune__ratio=0.5).finish("check", "prune")
    half = (place / "results/prune/model.safetensors").read_bytes()
    assert len(half) < len(first)

    place.edit(prune__ratio=1.0)
    assert place.planned("check", "prune") == Counter(check=1, prune=1)  # the refits are there too
    place.finish("check", "prune")
    assert (place / "results/prune/model.safetensors").read_bytes() == first
    assert [path.stat().st_mtime_ns for path in order_files] == stored


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "taylor", "sequential": True, "ratio": None, "budget": 0.6},
        {"method": "output_gram_schmidt", "ratio": None, "keep": 0.3, "ridge": 0.01},
    ],
    ids=lambda changes: changes["method"],
)
def test_other_ways_to_prune_run_through_the_rules(finished_copy, changes):
    place = finished_copy.edit(
        mlflow__tracking_uri=None, **{f"prune__{name}": value for name, value in changes.items()}
    )
    place.finish("check", "prune")
    about = json.loads((place / "results/prune/provenance.json").read_text())
    assert about["method"] == changes["method"]
    assert about["compensate"] == ("sequential" if changes.get("sequential") else "least_squares")
    blocks = json.loads((place / "results/prune/blocks.json").read_text())
    assert all(block["error_refit"] < block["error_plain"] for block in blocks.values())
    assert not place.planned("check", "prune")


def test_other_ways_to_distill_run_through_the_rules(finished_copy):
    """Two processes that ask the teacher themselves, intermediate blocks, pruning between stages."""
    place = finished_copy.edit(
        mlflow__tracking_uri=None,
        features__cache="none",
        features__blocks=[0],
        features__patch_tokens=2,
        distill__processes=2,
        distill__workers=1,
        distill__shard_above=0,
        distill__checkpoint_every_s=1,
        distill__max_bad_steps=2,
        distill__stages__all={
            "train": {"blocks": [0, 1]},
            "prune": {"ratio": 0.5, "blocks": [1, 1]},
            "loss": {"blocks": 0.5},
            "samples": 640,
            "lr": 1e-3,
            "end_weight_decay": 0.2,
            "accumulate": 2,
            "ema": 0.9,
        },
    )
    shown = place.run("--dry-run", "--printshellcmds", "distill").output
    assert (
        "--gpus 0 --processes 2 --workers 1 --shard-above 0 --checkpoint-every-s 1"
        " --max-bad-steps 2" in shown
    )
    place.finish("check", "distill")
    about = json.loads((place / "results/distill/pruned/all/provenance.json").read_text())
    first, second = about["widths"].values()
    assert second == first // 2 and about["compensate"] == "least_squares"
    blocks = json.loads((place / "results/distill/pruned/all/blocks.json").read_text())
    assert list(blocks.values())[1]["error_refit"] < list(blocks.values())[1]["error_plain"]
    rows = json.loads((place / "results/distill/all/history.json").read_text())
    assert {"pooled", "patch_tokens", "blocks"} < rows[-1].keys()
    manifest = json.loads((place / "results/features/manifest.json").read_text())
    assert not manifest["targets"]
    assert not place.planned("check", "distill")


@pytest.fixture(scope="module")
def other_code(finished, repository, tmp_path_factory):
    """The finished chain, to be run by a copy of the workflow that may be edited."""
    clone = tmp_path_factory.mktemp("repository")
    for name in ("Snakefile", "params.yaml"):
        shutil.copy(repository / name, clone)
    for name in ("workflow", "profiles", "envs"):
        shutil.copytree(
            repository / name, clone / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    place = finished.copy(tmp_path_factory.mktemp("copy") / "copy")
    return replace(place, snakefile=clone / "Snakefile")


def rewrite(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_code_reruns_the_stages_that_use_it(other_code):
    package = other_code.snakefile.parent / "workflow/dgmr"
    compensate = package / "prune/compensate.py"
    rewrite(compensate, '"""', '"""Reworded. ')
    append("\n\n# A comment.\n", "params.py")(package)
    append("\n\nunused = 1\n", "cli.py")(package)  # says how stages are called, not what they do
    assert not other_code.planned()

    append("\n\n_unused = 1\n", "prune/compensate.py")(package)
    of_earlier_rooms = Counter(track=3)
    assert other_code.planned() == REFITTED - of_earlier_rooms
