"""profiles/slurm with a Slurm that only writes down what it is asked; tests/cluster has a real one."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest
import yaml

# Installed under each command's name. Without accounting, as small clusters are.
SLURM = """#!{python}
import json, os, subprocess, sys
from pathlib import Path

name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
store = Path(sys.argv[0]).parent
if name == "sbatch":
    with (store / "asked.jsonl").open("a+") as asked:
        asked.write(json.dumps(arguments) + "\\n")
        asked.seek(0)
        job = str(len(asked.readlines()))
    if (store / "closed").exists():
        sys.exit("sbatch: error: the cluster is closed")
    script = arguments[-1].removeprefix("--wrap=")
    log = Path(arguments[arguments.index("--output") + 1].replace("%j", job))
    folder = arguments[arguments.index("-D") + 1]
    done = subprocess.run(
        [*{offline}, "bash", "-c", script], cwd=folder, env=os.environ | {{"SLURM_JOB_ID": job}},
        stdout=log.open("w"), stderr=subprocess.STDOUT,
    )
    (store / f"{{job}}.state").write_text("FAILED" if done.returncode else "COMPLETED")
    print(job)
elif name == "srun":
    command = next(i for i, argument in enumerate(arguments) if not argument.startswith("-"))
    os.execvp(arguments[command], arguments[command:])
elif name == "squeue":
    for state in store.glob("*.state"):
        print(f"{{state.stem}}|{{state.read_text()}}")
elif name == "sacct":
    sys.exit("Slurm accounting storage is disabled")
elif name == "scontrol":
    print("MinJobAge = 300 sec")
"""
# Compute nodes have no internet; where the kernel lets us, these jobs have no network at all.
OFFLINE = ["unshare", "--net", "--map-root-user"]
if (
    not shutil.which("unshare")
    or subprocess.run([*OFFLINE, "true"], capture_output=True).returncode
):
    OFFLINE = []
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "sacctmgr", "sshare", "scontrol", "sinfo")
OPTIONS = ("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "5")


class Slurm:
    def __init__(self, folder, place, profile):
        self.folder, self.place, self.profile = folder, place, profile
        for name in COMMANDS:
            (folder / name).write_text(SLURM.format(python=sys.executable, offline=OFFLINE))
            (folder / name).chmod(stat.S_IRWXU)

    def run(self, *arguments):
        profile = ["--workflow-profile", str(self.profile), *OPTIONS]
        path = f"{self.folder}:{os.environ['PATH']}"
        return self.place.run(*profile, *arguments, cores=None, PATH=path)

    def edit(self, stage, threads):
        """As a site edits the profile."""
        profile = yaml.safe_load((self.profile / "config.yaml").read_text())
        profile["set-resources"]["distill_stage"] |= stage
        profile["set-threads"]["distill_stage"] = threads
        self.profile = self.folder / "site"
        self.profile.mkdir()
        (self.profile / "config.yaml").write_text(yaml.safe_dump(profile))

    def asked(self):
        """Command lines of sbatch by rule and wildcards, without the script and this run's names."""
        found = {}
        for line in (self.folder / "asked.jsonl").read_text().splitlines():
            *options, script = json.loads(line)
            assert script.startswith("--wrap=")
            text = shlex.join(options).replace(str(self.place.folder), "WORK")
            text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "RUN", text)
            text = re.sub(r"(?<=[_/])[0-9a-f]{12}(?=[_ /])", "KEY", text)
            comment = re.search("--comment (\\S+)", text)[1]
            found[comment] = text
        return found


@pytest.fixture
def slurm(finished, repository, tmp_path):
    place = finished.copy(tmp_path / "copy")
    folder = tmp_path / "bin"
    folder.mkdir()
    return Slurm(folder, place, repository / "profiles/slurm")


def test_refused_jobs_asked_for_what_their_rule_says(slurm):
    (slurm.folder / "closed").touch()
    parts = sorted(slurm.place.folder.glob("work/prune/*/orders/part-*.json"))
    for part in parts:
        part.unlink()
    targets = [str(part.relative_to(slurm.place.folder)) for part in parts]
    done = slurm.run("--keep-going", "--retries", "0", *targets)
    assert done.status != 0 and "the cluster is closed" in done.output
    assert slurm.asked() == {
        f"rule_order_blocks_wildcards_KEY_{part}_2": (
            "--parsable --job-name RUN --output"
            f" WORK/logs/slurm/rule_order_blocks/KEY_{part}_2/%j.log --export=ALL"
            f" --comment rule_order_blocks_wildcards_KEY_{part}_2"
            " -t 240 --mem 4000 --requeue --ntasks=1 --cpus-per-task=1 -D WORK"
        )
        for part in range(2)
    }


def test_job_runs_on_the_cluster_and_local_rules_stay(slurm):
    wanted = []
    for pattern in ("results/distill/all/*.stamp", "results/track/teacher/*", "work/check/*"):
        wanted += slurm.place.folder.glob(pattern)
    assert len(wanted) == 3
    for path in wanted:
        path.unlink()
    done = slurm.run(*(str(path.relative_to(slurm.place.folder)) for path in wanted))
    assert done.status == 0, done.output
    assert all(path.exists() for path in wanted)
    assert slurm.asked() == {
        "rule_distill_stage_wildcards_results_all_KEY": (
            "--parsable --job-name RUN --output"
            " WORK/logs/slurm/rule_distill_stage/results_all_KEY/%j.log --export=ALL"
            " --comment rule_distill_stage_wildcards_results_all_KEY"
            " -t 720 --mem 16000 --nodes=1 --requeue --cpus-per-task=8 --signal=TERM@180 -D WORK"
            " --gpus=1"
        )
    }


SITES = {
    "2": ({"gpu": 2}, 16, "-t 720 --mem 16000 --nodes=1 --requeue --cpus-per-task=16 {} --gpus=2"),
    "8": ({"gpu": 8}, 64, "-t 720 --mem 16000 --nodes=1 --requeue --cpus-per-task=64 {} --gpus=8"),
    "2x8": (
        {"gpu": 16, "gres": "gpu:8", "nodes": 2, "mpi": "srun", "tasks": 2, "tasks_per_gpu": 0},
        64,
        "-t 720 --mem 16000 --nodes=2 --requeue --ntasks=2 --cpus-per-task=64 {} --gres=gpu:8"
        " --gpus=16",
    ),
    "own": (
        {"slurm_account": "ours", "slurm_partition": "gpu", "constraint": "a100", "runtime": 60},
        8,
        "-A ours -p gpu -t 60 -C a100 --mem 16000 --nodes=1 --requeue --cpus-per-task=8 {} --gpus=1",
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_edits_the_profile(slurm, name):
    stage, threads, line = SITES[name]
    slurm.edit(stage, threads)
    (slurm.folder / "closed").touch()
    (stamp,) = slurm.place.folder.glob("results/distill/all/*.stamp")
    stamp.unlink()
    done = slurm.run("--retries", "0", str(stamp.relative_to(slurm.place.folder)))
    assert "the cluster is closed" in done.output
    (asked,) = slurm.asked().values()
    _, _, asked = asked.partition(" --comment rule_distill_stage_wildcards_results_all_KEY ")
    assert asked == line.format("--signal=TERM@180 -D WORK")
