# What the jobs of each room read and are told where a line does not say it: functions of the wildcards and
# of the runs' keys. They stand here because `snakemake --lint` wants them away from what calls them.

from dgmr.params import Ordering

# Teacher


def local_teacher_files():
    """Files that a local teacher is read from; none where one is missing, for the check names it."""
    try:
        return [str(path) for path in teacher_files(PARAMS.teacher)]
    except DgmrError:
        return []


# Features


def all_targets(_wildcards):
    """Of all jobs. As a function, for Snakemake takes n^2 steps with a list of n files."""
    return ancient([f"{TARGETS}/{job}" for job in JOBS] if CACHED else [])


# Prune


def orders_of(keys):
    """The files of the orders, one a job."""
    parts = keys.params.prune.parts
    return [f"work/prune/{keys.orders}/orders/part-{p}-of-{parts}.json" for p in range(parts)]


def refits_of(keys):
    """The files of the refits: one a job, where each looks at its own blocks; none without."""
    prune = keys.params.prune
    if prune.compensate == "none":
        return []
    # Sequential refits follow one another, in one job that runs the whole model.
    parts = 1 if prune.sequential else prune.parts
    return [f"work/prune/{keys.refits}/refits/part-{p}-of-{parts}.json" for p in range(parts)]


def needed_for_orders(wildcards):
    """What the method looks at besides the weights."""
    keys = ORDERED[wildcards.key]
    prune = keys.params.prune
    calibration = [rules.features.output[0], CALIBRATION] if prune.needs_calibration else []
    saliency = [f"work/prune/{keys.saliency}/saliency"] if prune.method == "taylor" else []
    return ancient(calibration + saliency)


def options_of_orders(wildcards):
    keys = ORDERED[wildcards.key]
    prune = keys.params.prune
    return [
        option("--features", "results/features" if prune.needs_calibration else None),
        option(
            "--saliency",
            f"work/prune/{keys.saliency}/saliency" if prune.method == "taylor" else None,
        ),
    ]


def is_sequential(wildcards):
    return REFITTED[wildcards.key].params.prune.sequential


def ordering(wildcards):
    """The section as the orders read it."""
    prune = ORDERED[wildcards.key].params.prune
    asked = prune.model_copy(update={"parts": int(wildcards.parts)})
    return asked.model_dump_json(include=set(Ordering.model_fields))


def refitting(keys, parts):
    """The section as the refits read it."""
    prune = keys.params.prune.model_copy(update={"parts": parts})
    return prune.model_dump_json(exclude={"method", "seed", "tokens"})


# Distill


def stage_of(wildcards):
    return KEYS[wildcards.results].params.distill.stages[wildcards.stage]


def parent_of(wildcards):
    """The model that a stage comes after."""
    parent = KEYS[wildcards.results].parent(wildcards.stage)
    return ancient(model_stamp(wildcards.results, parent))


def start_of(wildcards):
    """The model that a stage trains: its parent, or that after the stage's own pruning."""
    if stage_of(wildcards).prune is None:
        return parent_of(wildcards)
    folder = f"{wildcards.results}/distill/pruned/{wildcards.stage}"
    return ancient(stamp(folder, KEYS[wildcards.results].prune_again(wildcards.stage)))


def trained_alike(wildcards):
    """The same stage of a run before, from whose checkpoints this one ends at once; side by side, one
    would only wait for the other."""
    before = list(KEYS)[: list(KEYS).index(wildcards.results)]
    alike = [run for run in before if KEYS[run].distill(wildcards.stage) == wildcards.key]
    return ancient([model_stamp(run, wildcards.stage) for run in alike[-1:]])


def rooms_of_stages(results):
    """The stamps of a run's stages, and of what they prune before they begin."""
    keys = KEYS[results]
    again = [name for name, stage in keys.params.distill.stages.items() if stage.prune is not None]
    return [
        *(model_stamp(results, stage) for stage in STAGES),
        *(stamp(f"{results}/distill/pruned/{name}", keys.prune_again(name)) for name in again),
    ]


# Evaluate


def made_last(models):
    """The runs and their keys, those that have all of ``models`` at the end."""

    def is_made(run):
        return all(os.path.exists(model_stamp(run[0], model)) for model in models)

    return sorted(KEYS.items(), key=is_made)


def scores_of(results):
    """The files of a run's scores by model."""
    keys = KEYS[results]
    return {model: f"work/evaluate/accuracy/{keys.evaluation(model)}.json" for model in keys.models}


def named_models(results):
    return [f"{name}={folder_of_model(results, name)}" for name in KEYS[results].models]


# Report


def rooms_of(results):
    """The rooms that the report of a run is about."""
    keys = KEYS[results]
    return [
        stamp("results/data", MAIN.data),
        *(model_stamp(results, model) for model in keys.models),
        stamp(f"{results}/evaluate", keys.evaluate),
    ]


def report_of(results):
    return stamp(f"{results}/student", KEYS[results].report)


# Track


def stamps_to_track(results):
    """The stamps of a run's rooms, by the names that MLflow knows them by."""
    return {
        **(MADE_ONCE if results == "results" else {}),
        "prune": model_stamp(results, "pruned"),
        **{f"distill/{stage}": model_stamp(results, stage) for stage in STAGES},
        "evaluate": stamp(f"{results}/evaluate", KEYS[results].evaluate),
        "report": report_of(results),
    }
