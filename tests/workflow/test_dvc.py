"""DVC runs the same rooms, a stage each, and versions what they give."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

STAGES = ["teacher", "data", "features", "prune", "distill", "evaluate", "report"]


class Clone:
    """A Git clone of the working tree as it is, with micro params."""

    def __init__(self, folder, environment):
        self.folder = folder
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


@pytest.fixture(scope="module")
def clone(repository, finished, tmp_path_factory, clean_environment):
    clone = Clone(tmp_path_factory.mktemp("dvc") / "clone", clean_environment)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("the repository is no Git checkout")
    for name in listed.stdout.splitlines():
        if (repository / name).is_file() and not name.startswith("tests/"):
            (clone.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, clone.folder / name)
    shutil.copytree(finished / "resources", clone.folder / "resources", dirs_exist_ok=True)
    # Fashion-MNIST's 60,000 files are not written again.
    (images,) = finished.folder.glob("work/data/*/images")
    table = images.with_name("table.parquet")
    work = clone.folder / table.parent.relative_to(finished.folder)
    work.mkdir(parents=True)
    shutil.copy2(table, work)
    (work / "images").symlink_to(images.resolve())
    values = yaml.safe_load((finished / "params.yaml").read_text())
    values["mlflow"]["tracking_uri"] = None
    (clone.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    clone.call("git", "init", "--quiet")
    clone.commit("before")
    return clone


def test_dvc_runs_and_versions_the_rooms(clone, finished):
    said = clone.call("dvc", "repro")
    for stage in STAGES:
        assert f"Running stage '{stage}'" in said
    assert (clone.folder / "results/report.html").exists()
    clone.commit("after")

    metrics = json.loads(clone.call("dvc", "metrics", "show", "--json"))
    shown = metrics[""]["data"]["results/metrics.json"]["data"]
    wanted = json.loads((finished / "results/metrics.json").read_text())
    speeds = [name for name in wanted if "images_per_s" in name]
    assert {**shown, **dict.fromkeys(speeds)} == {**wanted, **dict.fromkeys(speeds)}

    assert json.loads(clone.call("dvc", "status", "--json")) == {}
    assert "Running stage" not in clone.call("dvc", "repro")

    plots = clone.call("dvc", "plots", "show")
    assert plots.strip().endswith(".html")

    values = yaml.safe_load((clone.folder / "params.yaml").read_text())
    values["prune"]["ratio"] = 0.5
    (clone.folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    diff = json.loads(clone.call("dvc", "params", "diff", "--json"))
    assert diff == {"params.yaml": {"prune.ratio": {"old": 1.0, "new": 0.5, "diff": -0.5}}}
    assert list(json.loads(clone.call("dvc", "status", "--json"))) == ["prune"]
