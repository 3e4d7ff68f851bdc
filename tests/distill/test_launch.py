"""The command becomes torchrun where several processes are wanted."""

import json
import os
import re
import socket
import sys

import pytest
import torch
from dgmr import cli
from dgmr.distill import parallel, trainer
from dgmr.errors import DgmrError
from distill.conftest import stage


@pytest.fixture
def executed(monkeypatch):
    """Commands and environments that took the process over."""
    found = []
    monkeypatch.setattr(os, "execvpe", lambda path, command, env: found.append((command, env)))
    monkeypatch.setattr(sys, "argv", ["dgmr", "distill", "train", "--stage", "s"])
    return found


def test_torchrun_starts_the_same_command(executed):
    torch.set_num_threads(4)
    parallel.launch(3)
    ((command, env),) = executed
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    time_to_save = ["--shutdown-timeout=900"]
    own = ["-m", "dgmr", "distill", "train", "--stage", "s"]
    assert command == [sys.executable, "-m", *torchrun, *time_to_save, *own]
    assert env["OMP_NUM_THREADS"] == "1" and env["PATH"] == os.environ["PATH"]


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job of Slurm, as far as the launcher looks at it."""
    (tmp_path / "srun").touch(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpu07")


def test_srun_starts_a_torchrun_on_each_node(executed, slurm):
    torch.set_num_threads(32)
    parallel.launch(16, nodes=2)
    ((command, env),) = executed
    endpoint = next(word for word in command if word.startswith("--rdzv-endpoint="))
    assert re.fullmatch(r"--rdzv-endpoint=gpu07:\d{4,5}", endpoint)
    srun = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1"
    meeting = f"--nnodes=2 --rdzv-backend=c10d {endpoint} --rdzv-id=71"
    own = "-m dgmr distill train --stage s"
    assert " ".join(command) == (
        f"{srun} {sys.executable} -m torch.distributed.run {meeting} --nproc-per-node=8"
        f" --shutdown-timeout=900 {own}"
    )
    assert env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("count, nodes", [(3, 2), (1, 2)])
def test_nodes_that_cannot_share_are_refused(executed, slurm, count, nodes):
    sentence = f"^distill: {nodes} nodes cannot share {count} processes evenly: make the job's gpu"
    with pytest.raises(DgmrError, match=sentence):
        parallel.launch(count, nodes)
    assert not executed


@pytest.mark.parametrize("lacking", ["PATH", "SLURM_JOB_ID"])
def test_nodes_without_slurm_are_refused(executed, slurm, monkeypatch, lacking):
    monkeypatch.setenv(lacking, "")
    sentence = "2 nodes are for jobs of Slurm, and this is none: leave the resource nodes at 1"
    with pytest.raises(DgmrError, match=sentence):
        parallel.launch(2, nodes=2)
    assert not executed


def test_threads_are_shared(executed):
    torch.set_num_threads(4)
    parallel.launch(2)
    assert executed[0][1]["OMP_NUM_THREADS"] == "2"


def test_one_process_and_those_of_torchrun_go_on(executed, monkeypatch):
    parallel.launch(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    parallel.launch(2)
    assert not executed


def test_more_processes_than_accelerators_are_refused(executed, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    parallel.launch(2)
    with pytest.raises(DgmrError, match="3 processes want an accelerator each, .* has 2: lower"):
        parallel.launch(3)
    assert len(executed) == 1


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the command; gives what is launched, what the trainer is given, and what is said."""

    # The command may set it: so it is taken back.
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def command(**options):
        launched, trained = [], []
        monkeypatch.setattr(parallel, "launch", lambda *given: launched.append(given))
        monkeypatch.setattr(trainer, "train", lambda *given: trained.append(given))
        rooms = {name: "x" for name in ("parent", "teacher", "data", "features", "output")}
        given = {"stage": "s", "config": stage().model_dump_json()} | rooms | options
        words = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]
        monkeypatch.setattr(sys, "argv", ["dgmr", "distill", "train", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, launched, trained, capsys.readouterr().err

    return command


def test_what_says_how_a_stage_is_run_reaches_the_trainer(command):
    options = {"workers": 2, "shard_above": 5, "checkpoint_every_s": 7, "max_bad_steps": 0}
    code, launched, ((*_, runs, running),), _ = command(processes=3, runs="y", **options)
    assert code == 0 and launched == [(3, 1)] and str(runs) == "y"
    assert json.loads(running.model_dump_json()) == options | {"processes": 3}


def test_gpus_go_before_processes_and_workers_may_be_left_to_the_trainer(command):
    _, launched, ((*_, running),), _ = command(gpus=4, nodes=2, processes=3, workers="auto")
    assert launched == [(4, 2)] and running.workers is None


def test_workers_that_are_no_number_are_told_in_a_sentence(command):
    code, _, trained, said = command(workers="many")
    assert code == 2 and not trained
    assert said.startswith(
        'dgmr: running config: workers is "many": input should be a valid integer'
    )


def test_stages_ask_no_hub(command, monkeypatch):
    """On a compute node they would wait for the internet in vain."""
    command()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    command()
    assert os.environ["HF_HUB_OFFLINE"] == "0"


@pytest.mark.parametrize("words", ["teacher convert --help", "check --help", "plan --help"])
def test_what_fetches_may(words, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(sys, "argv", ["dgmr", *words.split()])
    with pytest.raises(SystemExit):
        cli.main()
    assert "HF_HUB_OFFLINE" not in os.environ
