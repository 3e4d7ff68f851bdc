"""DVC runs the same rooms, a stage each, and versions what they give; Snakemake always agrees."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOMS = ["teacher", "data", "evaluation_data", "features", "prune", "distill", "evaluate"]
STAGES = [*ROOMS, "sweep", "report"]
WHO = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]

# As little as makes a chain, for those tests that run many.
_STAGE = {"train": "mlp", "samples": 64, "batch_size": 32, "lr": 1e-3, "min_lr": 1e-5}
MICRO = {
    "sweep": {},  # DVC wants every section that it is told to look at
    "data__n_samples": 96,
    "data__shards_per_job": 1,
    "data__eval__n_samples": 64,
    "features__views__count": 1,
    "features__calibration": {"samples": 32, "tokens": 16},
    "prune__parts": 1,
    "distill": {"stages": {"mlp": _STAGE}, "workers": 0},
    "evaluate": {"batch_size": 64, "speed_batch_size": 8, "speed_repeats": 1},
    "mlflow__tracking_uri": None,
}
SETS = {
    "first": {},
    "data": {"data__seed": 1},
    "features": {"features__views__seed": 1, "features__calibration__samples": 24},
    "prune": {"prune__ratio": 0.5},
    "distill": {"distill__stages__all": _STAGE | {"train": "all", "prune": {"ratio": 0.5}}},
    "evaluate": {"data__eval__n_samples": 48, "evaluate__batch_size": 16},
}


class Clone:
    """A Git checkout of the working tree as it is, in a place with its own params."""

    def __init__(self, place, environment):
        self.folder = place.folder
        self.place = replace(place, snakefile=place / "Snakefile")
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        self.environment = environment | {
            "PATH": path,
            "DVC_NO_ANALYTICS": "true",
            "DVC_SITE_CACHE_DIR": f"{self.folder}-dvc",
        }

    def __truediv__(self, path):
        return self.folder / path

    def run(self, *command):
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )

    def call(self, *command):
        done = self.run(*command)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def said(self, *command):
        """The JSON that a command of DVC answers with."""
        return json.loads(self.call("dvc", *command, "--json") or "{}")

    def commit(self, message):
        """Of all that Git does not ignore; the commit's name."""
        self.call("git", "add", "--all")
        self.call("git", *WHO, "commit", "--quiet", "--allow-empty", "--message", message)
        return self.call("git", "rev-parse", "HEAD").strip()

    def check_agreed(self):
        """Neither DVC nor Snakemake has anything to do."""
        assert self.said("status") == {}
        assert not self.place.planned()

    def check_cache(self):
        """Nobody has written through a link into DVC's cache: every object still hashes to its name."""
        for path in (self / ".dvc/cache/files/md5").glob("??/*"):
            name = path.parent.name + path.name.removesuffix(".dir")
            assert hashlib.md5(path.read_bytes()).hexdigest() == name, path

    def pulled(self, folder):
        """A second clone, whose rooms come from a remote."""
        self.call("dvc", "remote", "add", "--default", "store", str(folder / "store"))
        self.commit("a remote")
        self.call("dvc", "push")
        second = self.second(folder / "second")
        second.call("dvc", "pull")
        return second

    def second(self, folder):
        """What ``git clone`` makes of it."""
        self.call("git", "clone", "--quiet", str(self.folder), str(folder))
        return Clone(
            replace(self.place, folder=folder, snakefile=folder / "Snakefile"), self.environment
        )


def check_out(repository, place, environment):
    """The files that Git knows of, or would, but for params.yaml."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("the repository is no Git checkout")
    clone = Clone(place, environment)
    for name in listed.stdout.splitlines():
        path = clone / name
        if (repository / name).is_file() and not path.exists() and not name.startswith("tests/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, path)
    clone.call("git", "init", "--quiet")
    clone.commit("before")
    return clone


def without_speeds(value):
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if "images_per_s" not in k}
        return {name: without_speeds(inner) for name, inner in kept.items()}
    return [without_speeds(inner) for inner in value] if isinstance(value, list) else value


def content(results):
    """By path what the rooms hold, and by their stamps what they were made of; but for times and speeds."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.is_dir() or name.startswith(("sweep", "track")):
            continue
        if path.name == "report.html":
            found[name] = None
        elif path.name == "README.md":
            found[name] = re.sub(r"[\d,]+ \|\n", "", path.read_text())  # images a second
        elif path.suffix == ".json":
            found[name] = without_speeds(json.loads(path.read_text()))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def clone(repository, finished, tmp_path, clean_environment):
    """With what plain Snakemake has left in it."""
    place = finished.copy(tmp_path / "clone").edit(mlflow__tracking_uri=None, sweep={})
    return check_out(repository, place, clean_environment)


def test_dvc_runs_and_versions_the_rooms(clone, finished, tmp_path):
    made = {
        path: path.stat().st_mtime_ns for path in clone.folder.glob("results/*/**/*.safetensors")
    }
    assert not (clone / "dvc.lock").exists()  # this repository claims no results
    assert set(clone.said("status")) == set(STAGES)
    said = clone.call("dvc", "repro")
    for stage in STAGES:
        assert f"Running stage '{stage}'" in said
    assert made == {
        path: path.stat().st_mtime_ns for path in made
    }  # Snakemake's rooms are taken over
    clone.commit("after")

    metrics = clone.said("metrics", "show")[""]["data"]["results/metrics.json"]["data"]
    expected = json.loads((finished / "results/metrics.json").read_text())
    assert metrics == expected
    assert clone.call("dvc", "plots", "show").strip().endswith(".html")

    assert "Running stage" not in clone.call("dvc", "repro")
    clone.check_agreed()

    # Elsewhere, with the rooms from a remote and without work/, there is nothing to do.
    second = clone.pulled(tmp_path)
    assert content(second / "results") == content(clone / "results")
    assert not (second / "work").exists()
    second.check_agreed()

    clone.place.edit(prune__ratio=0.5)
    diff = clone.said("params", "diff")
    assert diff == {"params.yaml": {"prune.ratio": {"old": 1.0, "new": 0.5, "diff": -0.5}}}
    assert set(clone.said("status")) == {"prune", "sweep", "report"}


@pytest.fixture(scope="module")
def micro(new_place):
    """Makes a place with one of the SETS; all take Fashion-MNIST as files from the first one."""
    places = []

    def make(name="first"):
        place = new_place(**MICRO).edit(**SETS[name])
        places.append(place)
        for file in places[0].folder.glob("work/data/*/*"):
            path = place / file.relative_to(places[0].folder)
            if (file.parent / "images").is_dir() and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(file)
        return place

    return make


@pytest.fixture(scope="module")
def clean(micro):
    """What a clean run of plain Snakemake gives, by set; each is run when it is first asked for."""

    class Clean(dict):
        def __missing__(self, name):
            place = micro(name)
            # With as many threads as DVC's commands have.
            done = place.run("--cores", "all", cores=None)
            assert done.status == 0, done.output
            self[name] = content(place / "results")
            return self[name]

    return Clean()


@pytest.fixture(scope="module")
def reproduced(repository, micro, clean, clean_environment):
    """The first set, made by DVC and committed; take a copy."""
    assert clean["first"]
    clone = check_out(repository, micro(), clean_environment)
    clone.call("dvc", "repro")
    clone.commit("first")
    assert same(clone, clean["first"])
    return clone


@pytest.fixture
def copied(reproduced, tmp_path, clean_environment):
    return Clone(reproduced.place.copy(tmp_path / "copy"), clean_environment)


def same(clone, wanted):
    """Whether the rooms hold what they shall; distill has a stamp of its own where DVC asked for it."""
    found = content(clone / "results")
    beyond = {name for name in found if name not in wanted}
    assert all(name.startswith("distill/") for name in beyond)
    return {name: found.get(name) for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copy", "symlink", "hardlink", "reflink"])
def test_there_and_back_with_every_kind_of_link(copied, clean, kind):
    if kind == "reflink":
        (copied / "a").write_text("a")
        done = copied.run("cp", "--reflink=always", "a", "b")
        if done.returncode:
            pytest.skip(f"the file system has no reflinks: {done.stdout.strip()}")
    copied.call("dvc", "config", "--local", "cache.type", kind)
    copied.call("dvc", "checkout", "--relink")
    model = copied / "results/prune/model.safetensors"
    assert model.is_symlink() == (kind == "symlink")
    assert (model.lstat().st_nlink > 1) == (kind == "hardlink")
    copied.check_agreed()

    copied.place.edit(prune__ratio=0.5)
    copied.call("dvc", "repro")
    copied.check_cache()
    copied.check_agreed()
    assert same(copied, clean["prune"])

    copied.place.edit(prune__ratio=1.0)
    copied.call("dvc", "repro")
    copied.check_cache()
    copied.check_agreed()
    assert same(copied, clean["first"])
    assert not copied.call("git", "status", "--porcelain", "dvc.lock")  # bit by bit as before


@pytest.mark.slow
def test_a_second_clone_goes_on(copied, clean, tmp_path):
    second = copied.pulled(tmp_path)
    second.check_agreed()
    second.place.edit(prune__ratio=0.5)
    second.call("dvc", "repro")
    second.check_agreed()
    assert same(second, clean["prune"])


@pytest.mark.slow
def test_a_room_leaves_all_others_alone(copied):
    copied.place.edit(features__calibration__samples=24, prune__ratio=0.5)
    before = content(copied / "results")
    for stage, wrong in [("prune", "features"), ("distill", "features"), ("evaluate", "prune")]:
        done = copied.run("dvc", "repro", "--force", "--single-item", stage)
        assert done.returncode != 0
        assert f"dgmr: results/{wrong} is not what params.yaml asks for" in done.stdout
        assert content(copied / "results") == before


@pytest.mark.slow
def test_an_experiment(copied, clean):
    assert "distill" in copied.call("dvc", "dag")
    copied.call("dvc", "exp", "run", "-S", "prune.ratio=0.5")
    copied.check_agreed()
    assert same(copied, clean["prune"])
    diff = copied.said("metrics", "diff")["results/metrics.json"]
    assert diff["pruned.params"]["diff"] < 0
    diff = copied.said("params", "diff")["params.yaml"]
    assert diff["prune.ratio"] == {"old": 1.0, "new": 0.5, "diff": -0.5}
    assert copied.call("dvc", "plots", "diff").strip().endswith(".html")
    assert copied.said("exp", "show")


@pytest.mark.slow
def test_changed_code(copied):
    """Whatever Snakemake would rerun, DVC would; a comment costs nothing but a look."""
    path = copied / "workflow/dgmr/prune/compensate.py"
    text = path.read_text()
    path.write_text(text + "\n\n_unused = 1\n")
    assert "assemble" in copied.place.planned() and "prune" in copied.said("status")
    path.write_text(text + "\n\n# A comment.\n")
    assert not copied.place.planned() and "prune" in copied.said("status")
    inodes = {p: p.stat().st_ino for p in copied.folder.glob("results/*/**/*.safetensors")}
    copied.call("dvc", "repro")
    assert inodes == {p: p.stat().st_ino for p in inodes}
    copied.check_agreed()


@pytest.mark.slow
def test_a_sweep_and_what_mlflow_was_told(copied, clean, tmp_path):
    copied.place.edit(mlflow__tracking_uri="sqlite:///mlflow.db", sweep={"prune.ratio": [1.0, 0.5]})
    copied.call("dvc", "repro")
    copied.check_agreed()
    points = {path.name: path for path in (copied / "results/sweep").iterdir() if path.is_dir()}
    assert set(points) == {"ratio-1.0", "ratio-0.5"}
    for name, path in clean["prune"].items():
        if name.startswith("prune/"):
            assert content(points["ratio-0.5"])[name] == path
    copied.commit("a sweep")
    second = copied.pulled(tmp_path)
    second.check_agreed()

    copied.place.edit(sweep={})
    copied.call("dvc", "repro")
    copied.check_agreed()
    (stamp,) = (copied / "results/sweep").iterdir()
    assert stamp.suffix == ".stamp"


class Walk:
    """Operations on a clone, in random order, and what is to hold after each of them."""

    def __init__(self, clone, clean, seed, sets=SETS):
        self.clone, self.clean, self.sets = clone, clean, sets
        self.random = random.Random(seed)
        self.base = (clone / "params.yaml").read_text()
        self.params = self.rooms = self.locked = "first"
        """The set that params.yaml has, that results/ is of, and that dvc.lock is of; None: a mixture."""
        self.commits = [("first", clone.commit("first"))]
        self.clone.call("git", "tag", "walk-0")

    def operations(self):
        """Each as often as it is worth, in random order."""
        often = {
            self.edit: 12,
            self.repro: 7,
            self.snakemake: 4,
            self.record: 3,
            self.check_out: 6,
            self.one_room: 4,
            self.forget: 3,
            self.relink: 4,
            self.collect: 2,
        }
        return self.random.sample(list(often), counts=often.values(), k=sum(often.values()))

    def edit(self):
        self.params = self.random.choice([name for name in self.sets if name != self.params])
        (self.clone / "params.yaml").write_text(self.base)
        self.clone.place.edit(**self.sets[self.params])
        return self.params

    def repro(self):
        self.clone.call("dvc", "repro")
        self.rooms = self.locked = self.params
        return self._commit()

    def snakemake(self):
        self.clone.call("snakemake", "--cores", "all", "--quiet", "all")
        self.rooms = self.params

    def record(self):
        """What plain Snakemake has made."""
        if self.rooms != self.params:
            self.snakemake()
        self.clone.call("dvc", "commit", "--force")
        self.locked = self.params
        return self._commit()

    def _commit(self):
        self.commits.append((self.params, self.clone.commit(self.params)))
        self.clone.call("git", "tag", f"walk-{len(self.commits) - 1}")

    def check_out(self):
        name, commit = self.random.choice(self.commits)
        self.clone.call("git", "checkout", "--quiet", "--force", "--detach", commit)
        self.clone.call("dvc", "checkout", "--force")
        self.params = self.rooms = self.locked = name
        return name

    def one_room(self):
        stage = self.random.choice(STAGES)
        own = {"report": ("student", "report.html", "track", "metrics.json", "curves.json")}

        def others():
            found = content(self.clone / "results")
            mine = own.get(stage, (f"{stage}/",))
            return {name: value for name, value in found.items() if not name.startswith(mine)}

        before = others()
        done = self.clone.run("dvc", "repro", "--single-item", stage)
        assert others() == before
        assert done.returncode == 0 or "is not what params.yaml asks for" in done.stdout
        if not self.params == self.rooms == self.locked:
            self.rooms = self.locked = None
        return f"{stage} {done.returncode}"

    def forget(self):
        folders = [path for path in (self.clone / "work").glob("*/*") if path.is_dir()]
        for folder in self.random.sample(sorted(folders), min(len(folders), 3)):
            if not (folder / "images").exists():  # Fashion-MNIST as files takes its time
                shutil.rmtree(folder)

    def relink(self):
        kind = self.random.choice(["copy", "hardlink", "symlink"])
        self.clone.call("dvc", "config", "--local", "cache.type", kind)
        self.clone.call("dvc", "checkout", "--relink", "--force")
        self.rooms = self.locked
        return kind

    def collect(self):
        self.clone.call("dvc", "gc", "--workspace", "--all-tags", "--force")

    def check(self):
        self.clone.check_cache()
        if self.rooms == self.params:
            assert same(self.clone, self.clean[self.params])
            assert not self.clone.place.planned()
            if self.locked == self.params:
                assert self.clone.said("status") == {}


def test_a_short_walk_ends_where_a_clean_run_does(clone, finished, tmp_path):
    """From what plain Snakemake has made, of which DVC does not know yet."""
    sets = {"first": {}, "evaluate": {"evaluate__speed_repeats": 3}}
    place = finished.copy(tmp_path / "clean").edit(**sets["evaluate"])
    place.finish()
    clean = {"first": content(finished / "results"), "evaluate": content(place / "results")}
    clone.call("dvc", "commit", "--force")
    walk = Walk(clone, clean, seed=0, sets=sets)
    walk.check()
    for operation in (
        walk.edit,
        walk.repro,
        walk.relink,
        walk.check_out,
        walk.edit,
        walk.snakemake,
        walk.record,
    ):
        print(operation.__name__, operation(), walk.params, walk.rooms, walk.locked, flush=True)
        walk.check()


@pytest.mark.slow
def test_a_random_walk_ends_where_a_clean_run_does(copied, clean):
    walk = Walk(copied, clean, seed=0)
    for step, operation in enumerate(walk.operations()):
        print(
            step, operation.__name__, operation(), walk.params, walk.rooms, walk.locked, flush=True
        )
        walk.check()
