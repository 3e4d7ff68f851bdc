"""What a change reruns: exactly the jobs that depend on it, and no other."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

ALL = Counter(all=1)
# MLflow is told of all rooms of a chain with other params, or of those after a change of code.
TRACKED = ALL + Counter(track=8)
REPORTED = TRACKED + Counter(report=1)


def evaluated(models):
    return REPORTED + Counter(evaluate_model=models, measure_speed=1, gather=1)


DISTILLED = evaluated(2) + Counter(distill_stage=2)
PRUNED = evaluated(3) + Counter(distill_stage=2, assemble=1)
REFITTED = PRUNED + Counter(refit_blocks=2)
ORDERED = REFITTED + Counter(order_blocks=2)
CHECKED = Counter(check=1)
# Behind a room that is made again the refits look at their blocks, and leave them as they are.
PUBLISHED = DISTILLED + Counter(features=1, refit_blocks=2)
REDRAWN = REFITTED + Counter(data=1, targets=2, calibration=1, features=1)  # all images are others
OTHER_TEACHER = (
    ORDERED
    + Counter(teacher=1, targets=2, calibration=1, features=1)
    + Counter(evaluate_model=1)  # the teacher itself
    - Counter(track=1)  # the data
)


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
    def change(place):
        (found,) = place.folder.glob(path)
        shutil.rmtree(found) if found.is_dir() else found.unlink()

    return change


def replace_shard(place):
    shutil.copy(place / "results/data/00001.tar", place / "copied.tar")
    (place / "copied.tar").replace(place / "results/data/00000.tar")


def plan_another(place):
    """What a dry run looks at leaves no trace."""
    assert place.edit(prune__ratio=0.5).planned()
    place.edit(prune__ratio=1.0)


def rewrite(path, old, new):
    def change(place):
        file = place.snakefile.parent / path
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))

    return change


TEACHER = "resources/teachers/micro"
STAGE_3 = {"train": "mlp", "samples": 64, "lr": 1e-4}
CASES = {
    "nothing": (lambda place: None, Counter()),
    "a dry run with other params": (plan_another, Counter()),
    "params.yaml touched": (touch("params.yaml"), Counter()),
    "params.yaml: comment and empty lines": (append("\n\n# a comment\n", "params.yaml"), Counter()),
    "params.yaml: a default written out": (set_params(prune__round_to=1), Counter()),
    # distill
    "last stage's lr": (
        set_params(distill__stages__all__lr=5e-4),
        CHECKED + evaluated(1) + Counter(distill_stage=1),
    ),
    "first stage's lr": (set_params(distill__stages__mlp__lr=5e-4), CHECKED + DISTILLED),
    "last stage's prune": (
        set_params(distill__stages__all__prune={"ratio": 0.5}),
        CHECKED + evaluated(1) + Counter(distill_stage=1, prune_again=1),
    ),
    "a stage more": (
        set_params(distill__stages__third=STAGE_3),
        CHECKED + evaluated(1) + Counter(distill_stage=1, track=1),
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
    # prune
    "prune.ratio": (set_params(prune__ratio=0.5), CHECKED + REFITTED),
    "prune.ridge": (set_params(prune__ridge=0.1), CHECKED + REFITTED),
    "prune.compensate: none": (set_params(prune__compensate="none"), CHECKED + PRUNED),
    "prune.max_ratio": (set_params(prune__max_ratio=3.0), CHECKED + ORDERED),
    "prune.method: output_gram_schmidt": (
        set_params(prune__method="output_gram_schmidt"),
        CHECKED + ORDERED,
    ),
    "prune.method: taylor": (
        set_params(prune__method="taylor"),
        CHECKED + ORDERED + Counter(saliency=1),
    ),
    "prune.sequential": (
        set_params(prune__sequential=True),
        CHECKED + PRUNED + Counter(refit_blocks=1),
    ),
    "prune.parts": (set_params(prune__parts=1), CHECKED + REPORTED),  # the page lists the params
    # features
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
        CHECKED + REFITTED + Counter(calibration=1, features=1),
    ),
    # data
    "data.seed": (
        set_params(data__seed=1),
        CHECKED + REDRAWN + Counter(select_samples=1, pack_shards=2),
    ),
    "data.n_samples": (
        set_params(data__n_samples=250),
        CHECKED + REDRAWN + Counter(select_samples=1, pack_shards=2),
    ),
    "data.image_size": (
        set_params(data__image_size=20),
        CHECKED + REDRAWN + Counter(pack_shards=2),
    ),
    "data.shards_per_job": (
        set_params(data__shards_per_job=3),
        CHECKED + REDRAWN + Counter(select_samples=1, pack_shards=1) - Counter(targets=1),
    ),
    "data.eval.n_samples": (
        set_params(data__eval__n_samples=100),
        CHECKED
        + REPORTED
        + Counter(pack_evaluation=1, evaluation_data=1, evaluate_model=4, gather=1),
    ),
    # evaluate, mlflow, sweep
    "evaluate.batch_size": (
        set_params(evaluate__batch_size=64),
        REPORTED + Counter(evaluate_model=4, gather=1),
    ),
    "evaluate.speed_repeats": (
        set_params(evaluate__speed_repeats=3),
        REPORTED + Counter(measure_speed=1, gather=1),
    ),
    "mlflow.experiment": (set_params(mlflow__experiment="other"), TRACKED),
    "mlflow.tracking_uri: null": (set_params(mlflow__tracking_uri=None), Counter()),
    "sweep": (
        set_params(sweep={"prune.ratio": [0.5, 2.0]}),
        CHECKED
        + Counter(refit_blocks=4, assemble=2, distill_stage=4, evaluate_model=6)
        + Counter(measure_speed=2, gather=2, report_point=2, report=1, track=2 * 5 + 1)
        + ALL,
    ),
    # files
    "a shard touched": (touch("results/data/00000.tar"), Counter()),
    "a shard replaced": (replace_shard, Counter()),  # whoever reads it refuses it: below
    "the teacher touched": (touch(f"{TEACHER}/model.safetensors"), Counter()),
    "the teacher's files changed": (append("\n", f"{TEACHER}/config.json"), OTHER_TEACHER),
    "check.json gone": (remove("work/check"), Counter()),
    "the page gone": (remove("results/report.html"), ALL + Counter(report=1)),
    # With those that read it, for Snakemake cannot know that it comes back as it was.
    "a room gone": (
        remove("results/prune"),
        ALL
        + Counter(assemble=1, distill_stage=1, evaluate_model=1, measure_speed=1)
        + Counter(report=1, track=1),
    ),
    "a stage gone": (
        remove("results/distill/mlp"),
        ALL + Counter(distill_stage=2, evaluate_model=1, measure_speed=1, report=1, track=1),
    ),
    "work/ gone": (remove("work"), Counter()),
    "Snakemake's records gone": (remove(".snakemake"), Counter()),
    # code
    "a rule's command": (
        rewrite("workflow/rules/distill.smk", "distill train --stage", "distill train  --stage"),
        DISTILLED - Counter(track=4),
    ),
    "a rule's memory, and a comment": (
        rewrite("workflow/rules/features.smk", "runtime=60,", "runtime=61,  # minutes"),
        Counter(),
    ),
    "a module's docstring": (
        rewrite("workflow/dgmr/prune/compensate.py", '"""Closed-form', '"""Reworded: closed-form'),
        Counter(),
    ),
    "a module": (
        rewrite("workflow/dgmr/prune/compensate.py", "\nimport copy", "\n_unused = 1\nimport copy"),
        REFITTED - Counter(track=3),
    ),
    "the command line's module": (
        rewrite(
            "workflow/dgmr/cli.py", "\nimport dataclasses", "\n_unused = 1\nimport dataclasses"
        ),
        Counter(),
    ),
}


@pytest.fixture(scope="module")
def plans(finished, repository, tmp_path_factory):
    """What each case plans, two at a time, with a workflow of its own."""

    def plan(case):
        change, _ = case
        place = finished.copy(tmp_path_factory.mktemp("case") / "copy")
        code = tmp_path_factory.mktemp("repository")
        for name in ("Snakefile", "params.yaml"):
            shutil.copy(repository / name, code)
        for name in ("workflow", "profiles", "envs"):
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(repository / name, code / name, ignore=ignored)
        place = replace(place, snakefile=code / "Snakefile")
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
    # Orders and refits are there, and that it was checked.
    assert place.planned("check", "prune") == Counter(assemble=1, prune=1)
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
        "--gpus 0 --nodes 1 --processes 2 --workers 1 --shard-above 0 --checkpoint-every-s 1"
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


def test_replaced_shard_is_refused_by_its_readers(finished_copy):
    replace_shard(finished_copy)
    done = finished_copy.edit(features__views__seed=7, mlflow__tracking_uri=None).run("features")
    assert done.status != 0
    assert "results/data/00000.tar" in done.output


def test_preset_and_back(finished_copy, repository):
    preset = str(repository / "presets/vit_b.yaml")
    assert finished_copy.planned("--configfile", preset)["teacher"] == 1
    assert not finished_copy.planned()


def test_resources_bound_what_jobs_ask_for(finished_copy):
    """A training asks for a GPU; it gets no more than the machine has, or than it is told."""
    changed = finished_copy.edit(distill__stages__all__lr=2e-4)
    shown = ("--dry-run", "--printshellcmds", "distill")
    asked = ("--set-resources", "distill_stage:gpu=4", "--resources")
    for gpus in (0, 2, 8):
        said = changed.run(*shown, *asked, f"gpu={gpus}").output
        assert f" --gpus {min(gpus, 4)} --nodes 1 " in said
