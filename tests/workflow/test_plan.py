"""The plan's jobs are those that Snakemake plans."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from dgmr.keys import Keys
from dgmr.params import read
from dgmr.plan import jobs
from dgmr.track.accounts import all_rooms


def jobs_by_rule(path):
    return {rule: count for rules in jobs(read(path)).values() for rule, count in rules.items()}


def test_default_params(new_place, repository):
    place = new_place()
    shutil.copy(repository / "params.yaml", place / "params.yaml")
    assert place.planned() == jobs_by_rule(place / "params.yaml")


def test_changed_params(new_place):
    place = new_place(
        data__source="table",
        data__table="nowhere.parquet",
        data__urls="http",
        data__n_samples=1050,
        prune__method="taylor",
        prune__parts=3,
        prune__sequential=True,
        mlflow__tracking_uri=None,
    )
    values = yaml.safe_load((place / "params.yaml").read_text())
    values["distill"]["stages"] |= {"third": values["distill"]["stages"]["all"]}
    place.edit(distill=values["distill"])
    found = jobs_by_rule(place / "params.yaml")
    assert place.planned() == found
    assert found["pack_shards"] == 6 and found["saliency"] == found["refit_blocks"] == 1


def test_sweep(new_place):
    """What runs have in common is planned once: orders by method, refits by width, equal models."""
    place = new_place(
        sweep={
            "prune.ratio": [1.0, 0.5],
            "prune.method": ["gram_schmidt", "magnitude", "taylor"],
            "prune.compensate": ["least_squares", "none"],
            "distill.stages.all.prune": [None, {"ratio": 0.25}],
        }
    )
    found = jobs_by_rule(place / "params.yaml")
    assert place.planned() == found
    points = 2 * 3 * 2 * 2
    assert found["order_blocks"] == 3 * 2 and found["saliency"] == 1
    assert found["refit_blocks"] == 2 * 3 * 2
    assert found["report_point"] == points and found["distill_stage"] == 2 * (points + 1)
    assert found["prune_again"] == points / 2
    # The run itself is one of the points; the first stage is that of half of them.
    assert found["evaluate_model"] == 1 + points / 2 + points / 2 + points
    assert found["pack_shards"] == 2 and found["features"] == found["teacher"] == 1


def test_runs_with_the_same_stage_train_it_one_after_the_other(new_place, monkeypatch):
    """They have its checkpoints in common."""
    place = new_place(sweep={"distill.stages.all.seed": [1, 2]}, mlflow__tracking_uri=None)
    monkeypatch.chdir(place.folder)
    points = {name: Keys(point) for name, point in read(place / "params.yaml").points().items()}

    def stages(name, stage):
        key = points[name].distill(stage)
        return place.planned(f"results/sweep/{name}/distill/{stage}/{key}.stamp")["distill_stage"]

    # The first stage is that of the run itself and of all points; the seed 1 is the run's own.
    assert [stages(name, "mlp") for name in points] == [2, 3]
    assert [stages(name, "all") for name in points] == [4, 4]


def test_mlflow_is_told_of_the_rooms_that_sync_tells(new_place):
    place = new_place(sweep={"prune.ratio": [1.0, 0.5]})
    shell = place.run("--dry-run", "--printshellcmds").output
    found = re.findall(r"track room (\S+) --results (\S+) .*?(?: --point (\S+))? --output", shell)
    rooms = all_rooms(read(place / "params.yaml"), Path("results"))
    assert sorted(found) == sorted((room.name, str(room.results), room.point) for room in rooms)


@pytest.mark.parametrize("preset", ["vit_b"])
def test_preset_takes_the_place_of_params_yaml(new_place, repository, preset):
    path = repository / f"presets/{preset}.yaml"
    assert new_place().planned("--configfile", str(path)) == jobs_by_rule(path)
