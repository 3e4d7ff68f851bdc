"""The plan's jobs are those that Snakemake plans."""

import shutil

import pytest
import yaml
from dgmr.params import read
from dgmr.plan import jobs


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


@pytest.mark.parametrize("preset", ["vit_b"])
def test_preset_takes_the_place_of_params_yaml(new_place, repository, preset):
    path = repository / f"presets/{preset}.yaml"
    assert new_place().planned("--configfile", str(path)) == jobs_by_rule(path)
