"""DVC runs the same rooms, a stage each, and versions what they give."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

STAGES = ["teacher", "data", "features", "prune", "distill", "evaluate", "report"]


class Clone:
    """A Git clone of the working tree as it is, with micro params."""

    def __init__(self, place, environment):
        self.folder = place.folder
        self.place = replace(place, snakefile=place / "Snakefile")
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        self.environment = environment | {"PATH": path, "DVC_NO_ANALYTICS": "true"}

    def call(self, *command):
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def commit(self, message):
        self.call("git", "add", "--all")
        who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
        self.call("git", *who, "commit", "--quiet", "--message", message)


@pytest.fixture
def clone(repository, finished, tmp_path, clean_environment):
    """With what plain Snakemake has left in it: DVC deletes the rooms, not what is under work/."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("the repository is no Git checkout")
    clone = Clone(finished.copy(tmp_path / "clone"), clean_environment)
    clone.place.edit(mlflow__tracking_uri=None)
    for name in listed.stdout.splitlines():
        path = clone.folder / name
        if (repository / name).is_file() and not path.exists() and not name.startswith("tests/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, path)
    clone.call("git", "init", "--quiet")
    clone.commit("before")
    return clone


def test_dvc_runs_and_versions_the_rooms(clone, finished):
    orders = {path: path.stat().st_mtime_ns for path in clone.folder.glob("work/prune/*/orders/*")}
    said = clone.call("dvc", "repro")
    for stage in STAGES:
        assert f"Running stage '{stage}'" in said
    assert orders == {path: path.stat().st_mtime_ns for path in orders}
    assert (clone.folder / "results/report.html").exists()
    clone.commit("after")

    metrics = json.loads(clone.call("dvc", "metrics", "show", "--json"))
    shown = metrics[""]["data"]["results/metrics.json"]["data"]
    expected = json.loads((finished / "results/metrics.json").read_text())
    speeds = dict.fromkeys(name for name in expected if "images_per_s" in name)
    assert len(speeds) < len(expected) and shown | speeds == expected | speeds
    assert clone.call("dvc", "plots", "show").strip().endswith(".html")

    assert "Running stage" not in clone.call("dvc", "repro")
    assert not clone.place.planned()  # Snakemake agrees that all is done

    clone.place.edit(prune__ratio=0.5)
    diff = json.loads(clone.call("dvc", "params", "diff", "--json"))
    assert diff == {"params.yaml": {"prune.ratio": {"old": 1.0, "new": 0.5, "diff": -0.5}}}
    assert set(json.loads(clone.call("dvc", "status", "--json"))) == {"prune", "report"}
