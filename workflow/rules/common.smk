# Validated params, the keys of every run, and what every rule needs to call its stage.
#
# A run is the chain with one set of params: that of params.yaml under results/, and one under
# results/sweep/<point>/ for each point of the section sweep. All are made by the same rules.
#
# Whatever shapes a result is in its key (dgmr.keys), and the key in the name of the file that Snakemake
# is asked for. So a file that is there is right, however old: all inputs are ancient().

import json
import os
import sys

from snakemake.exceptions import WorkflowError

PACKAGES = os.path.join(workflow.basedir, "workflow")
sys.path.insert(0, PACKAGES)

from dgmr import machine
from dgmr.checkpoint import teacher_files
from dgmr.errors import DgmrError
from dgmr.keys import Keys
from dgmr.params import validate

# Jobs run here, not on a cluster, whose executor is not known yet as this is read; but it has nodes.
IS_LOCAL = workflow.is_main_process and workflow.resource_settings.nodes is None

try:
    PARAMS = validate(config, ", ".join(map(str, workflow.overwrite_configfiles)) or "params.yaml")
    if workflow.is_main_process and not workflow.dryrun:
        machine.take_over_from_the_dead(IS_LOCAL)
except DgmrError as error:
    raise WorkflowError(str(error)) from None

# Jobs find this Python and this package, whether or not the environment is activated; a conda
# environment (--sdm conda) is activated later and goes first.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.getenv("PATH", "")]),
    PYTHONPATH=PACKAGES,
)

# What this machine has bounds what runs on it at once; --resources says otherwise.
if IS_LOCAL:
    os.environ[machine.RUN] = os.getcwd()
    for name, available in machine.resources().items():
        if name not in workflow.global_resources:
            workflow.global_resources[name] = available

MAIN = Keys(PARAMS)
POINTS = MAIN.points
KEYS = {"results": MAIN} | {f"results/sweep/{point}": keys for point, keys in POINTS.items()}
JOBS = PARAMS.data.jobs
STAGES = PARAMS.distill.stages


def keys_by(name):
    """Keys of the runs by one of them: those of runs that share it are as good as each other."""
    return {getattr(keys, name): keys for keys in KEYS.values()}


def stamp(folder, key):
    """What a room is asked for by: the file that is written last."""
    return f"{folder}/{key}.stamp"


def option(name, value):
    """``name value`` for a command line, or nothing where there is no value."""
    return f"{name} {value}" if value else ""


def folder_of(name):
    """For params: the folder of the rule's input or output ``name``, or of its first file."""

    def folder(wildcards, input, output):
        files = output if name == "output" else getattr(input, name)
        return os.path.dirname(files if isinstance(files, str) else files[0])

    return folder


def shards_of(wildcards):
    """Names of the shards that a job works through."""
    return JOBS[wildcards.job]


def folder_of_model(results, model):
    """Where a run has a model's artefact."""
    if model == "teacher":
        return "results/teacher"
    return f"{results}/prune" if model == "pruned" else f"{results}/distill/{model}"


def model_stamp(results, model):
    return stamp(folder_of_model(results, model), KEYS[results].model(model))


localrules:
    all,


wildcard_constraints:
    key="[0-9a-f]{12}",
    results="results(/sweep/[^/]+)?",
    job=r"\d{5}",
    part=r"\d+",
    parts=r"\d+",
    stage="|".join(STAGES),
    model="|".join(MAIN.models),
