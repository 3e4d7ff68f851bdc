# Validated params, and what every rule needs to call its stage.
#
# A rule hands its stage just the section it reads, as JSON among the rule's params, so a changed knob
# reruns its readers only; the stage's code is a hash among them, for Snakemake does not see imports.

import json
import os
import sys

from snakemake.exceptions import WorkflowError

PACKAGES = os.path.join(workflow.basedir, "workflow")
sys.path.insert(0, PACKAGES)

from dgmr.checkpoint import teacher_files
from dgmr.errors import DgmrError
from dgmr.fingerprint import code, key, versions
from dgmr.params import validate

try:
    PARAMS = validate(config, ", ".join(map(str, workflow.overwrite_configfiles)) or "params.yaml")
except DgmrError as error:
    raise WorkflowError(str(error)) from None

# Jobs find this Python and this package, whether or not the environment is activated; a conda
# environment (--sdm conda) is activated later and goes first.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.getenv("PATH", "")]),
    PYTHONPATH=PACKAGES,
)

CHECKED = "work/check.json"
SHAPING = PARAMS.shaping()
JOBS = PARAMS.data.jobs
STAGES = PARAMS.distill.stages
FOLDERS = {"teacher": "results/teacher", "pruned": "results/prune"} | {
    stage: f"results/distill/{stage}" for stage in STAGES
}

ARTEFACT = ["model.safetensors", "config.json", "provenance.json"]


def option(name, value):
    """``name value`` for a command line, or nothing where there is no value."""
    return f"{name} {value}" if value else ""


def folder_of(name):
    """For params: the folder of the rule's input or output ``name``, or of its first file."""

    def folder(wildcards, input, output):
        files = output if name == "output" else getattr(input, name)
        return os.path.dirname(files if isinstance(files, str) else files[0])

    return folder


def local_teacher_files():
    """Files that a local teacher is read from; none where one is missing, for the check names it."""
    try:
        return [str(path) for path in teacher_files(PARAMS.teacher)]
    except DgmrError:
        return []


def shards_of(wildcards):
    """Names of the shards that a job works through."""
    return JOBS[wildcards.job]


def parent_of(wildcards):
    """The model that a stage comes after: the stage's before it, or the pruned one."""
    names = ["pruned", *STAGES]
    return FOLDERS[names[names.index(wildcards.stage) - 1]]


def start_of(wildcards):
    """The model that a stage trains: its parent, or that after the stage's own pruning."""
    if STAGES[wildcards.stage].prune is None:
        return parent_of(wildcards)
    return f"results/distill/pruned/{wildcards.stage}"


def artefact_of(folder):
    """A model artefact's files."""
    return [f"{folder}/{file}" for file in ARTEFACT]


localrules:
    all,


wildcard_constraints:
    job=r"\d{5}",
    part=r"\d+",
    stage="|".join(STAGES),
    model="|".join(FOLDERS),
