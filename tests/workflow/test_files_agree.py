"""Files that must say the same: environments, lock, rules, params, Makefile."""

import os
import re
import subprocess

import pytest
import yaml

RULE = re.compile(r"^rule (\w+):\n((?:(?: .*)?\n)+)", re.MULTILINE)
DIRECTIVE = re.compile(r"^    (\w+):", re.MULTILINE)


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", requirement).lower()


def pins(lines):
    return {
        name_of(name): version
        for name, equals, version in (line.strip().partition("==") for line in lines)
        if equals
    }


@pytest.fixture(scope="module")
def environments(repository):
    return {path.name: yaml.safe_load(path.read_text()) for path in repository.glob("envs/*.yaml")}


@pytest.fixture(scope="module")
def rules(repository):
    """Text of each rule, by name."""
    files = [repository / "Snakefile", *sorted(repository.glob("workflow/rules/*.smk"))]
    return dict(rule for path in files for rule in RULE.findall(path.read_text() + "\n"))


def test_environments_are_complete(environments):
    assert set(environments) == {"dgmr.yaml", "download.yaml"}
    for environment in environments.values():
        assert "conda-forge" in environment["channels"]
        assert "python =3.11" in environment["dependencies"]


def test_pins_are_those_of_the_lock(environments, repository):
    lock = pins((repository / "requirements.lock").read_text().splitlines())
    (listed,) = (d["pip"] for d in environments["dgmr.yaml"]["dependencies"] if type(d) is dict)
    pinned = pins(listed)
    assert len(pinned) == len(listed)
    assert pinned == {name: lock.get(name) for name in pinned}


def test_environment_has_what_the_package_imports(environments, repository):
    (listed,) = (d["pip"] for d in environments["dgmr.yaml"]["dependencies"] if type(d) is dict)
    imported = set()
    for path in (repository / "workflow/dgmr").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    names = {"PIL": "pillow", "yaml": "pyyaml"}
    needed = {name_of(names.get(name, name)) for name in imported}
    known = {name_of(line) for line in pins((repository / "requirements.lock").read_text().split())}
    # These come with jinja2, torchvision and mlflow.
    assert (needed & known) - set(pins(listed)) <= {"markupsafe", "pillow", "sqlalchemy"}


def test_img2dataset_is_pinned_once(environments, repository):
    (listed,) = (d["pip"] for d in environments["download.yaml"]["dependencies"] if type(d) is dict)
    text = (repository / "workflow/rules/data.smk").read_text()
    assert listed == re.findall(r"--from (img2dataset==\S+) img2dataset", text)


def test_every_rule_with_a_command_has_log_environment_and_message(rules):
    commands = {name: text for name, text in rules.items() if "shell" in DIRECTIVE.findall(text)}
    assert set(rules) - set(commands) == {"all", "prune", "evaluate"}
    for name, text in commands.items():
        assert {"log", "conda", "message"} <= set(DIRECTIVE.findall(text)), name
        assert re.search(r"2>&1 \| (\(trap '' TERM INT; )?tee \{log\}", text), name


def test_every_section_of_params_is_read(repository):
    paths = [*repository.glob("workflow/rules/*.smk"), repository / "workflow/dgmr/keys.py"]
    text = "".join(path.read_text() for path in paths)
    for section in yaml.safe_load((repository / "params.yaml").read_text()):
        wanted = r"\.points\(\)" if section == "sweep" else rf"\b(?i:params)\.{section}\b"
        assert re.search(wanted, text), section


def test_every_room_of_dvc_is_a_target_and_has_its_params(rules, repository):
    pipeline = yaml.safe_load((repository / "dvc.yaml").read_text())
    need, room, only = (value for variable in pipeline["vars"] for value in variable.values())
    to_work = only.split()[1:]
    sections = set(yaml.safe_load((repository / "params.yaml").read_text()))
    read, makers = set(), set()
    for name, stage in pipeline["stages"].items():
        first, *_, command = stage["cmd"] if isinstance(stage["cmd"], list) else ["", stage["cmd"]]
        rooms = [name for name in stage["deps"] if name.startswith("results/")]
        assert first.split() == (["${need}", *map(os.path.basename, rooms)] if rooms else []), name
        targets, _, allowed = command.removeprefix("${room} ").partition(" ${only} ")
        assert {targets, *allowed.split()} <= set(rules), name
        assert set(stage["params"]) <= sections, name
        read |= set(stage["params"])
        makers |= set(allowed.split())
    assert read == sections
    # A room's command makes its own room; what is under work/ it may make as well.
    assert need.endswith(" dgmr need") and only.split()[0] == "--allowed-rules"
    assert room == "snakemake --cores all check"
    assert makers.isdisjoint(to_work)
    assert makers | {*to_work, "train_demo_teacher"} == set(rules)
    for name in to_work:
        output = rules[name].partition("    output:\n")[2].partition("    log:\n")[0]
        assert "stamp" not in output and "results" not in output, name


def test_slurm_profile_names_rules_that_exist(rules, repository):
    profile = yaml.safe_load((repository / "profiles/slurm/config.yaml").read_text())
    assert {*profile["set-resources"], *profile["set-threads"]} <= set(rules)


def test_profiles_say_alike_what_the_keys_need(repository):
    """Without both, Snakemake makes again what is right, or ends before all is made."""
    for path in repository.glob("profiles/*/config.yaml"):
        profile = yaml.safe_load(path.read_text())
        assert profile["ignore-incomplete"] is True and "rerun-incomplete" not in profile, path
        assert profile["rerun-triggers"] == ["mtime", "software-env"], path


def test_make_help_lists_every_target(repository):
    text = (repository / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    said = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    )
    assert sorted(re.findall(r"^  make (\S+) +\S", said.stdout, re.MULTILINE)) == sorted(phony)
