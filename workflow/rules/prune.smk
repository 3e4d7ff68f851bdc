# Prune: order every block's hidden units, refit what is kept, assemble the student.
#
# Runs of a sweep share what they can: orders and refits stand in work/ by their keys.

from dgmr.params import Ordering

SCORED = keys_by("saliency")
ORDERED = keys_by("orders")
REFITTED = keys_by("refits")


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


localrules:
    prune,
    assemble,


rule saliency:
    input:
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.data.output),
    output:
        directory("work/prune/{key}/saliency"),
    log:
        "logs/saliency/{key}.log",
    benchmark:
        "work/benchmark/saliency/{key}/saliency.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=32000,
        runtime=240,
        gpu=1,
    params:
        teacher=folder_of("teacher"),
        data=folder_of("data"),
        config=CALIBRATION_CONFIG,
        seed=lambda wildcards: SCORED[wildcards.key].params.prune.seed,
    message:
        "Scoring the hidden units by what the features lose"
    shell:
        "python -m dgmr prune saliency --teacher {params.teacher} --data {params.data}"
        " --features {params.config:q} --seed {params.seed} --output {output} 2>&1 | tee {log}"


rule order_blocks:
    input:
        needed_for_orders,
        teacher=ancient(rules.teacher.output),
    output:
        "work/prune/{key}/orders/part-{part}-of-{parts}.json",
    log:
        "logs/order_blocks/{key}/{part}-of-{parts}.log",
    benchmark:
        "work/benchmark/order_blocks/{key}/{part}-of-{parts}.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: lambda wildcards: 4 if ORDERED[wildcards.key].params.prune.needs_calibration else 1
    resources:
        mem_mb=lambda wildcards: (
            16000 if ORDERED[wildcards.key].params.prune.needs_calibration else 4000
        ),
        runtime=240,
    params:
        teacher=folder_of("teacher"),
        config=ordering,
        options=options_of_orders,
        folder=folder_of("output"),
    message:
        "Ordering the hidden units, part {wildcards.part}"
    shell:
        "python -m dgmr prune orders --teacher {params.teacher} --config {params.config:q}"
        " {params.options} --part {wildcards.part} --output {params.folder} 2>&1 | tee {log}"


rule refit_blocks:
    input:
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.data.output),
        features=ancient(rules.features.output),
        calibration=ancient(rules.calibration.output),
        orders=lambda wildcards: ancient(orders_of(REFITTED[wildcards.key])),
    output:
        "work/prune/{key}/refits/part-{part}-of-{parts}.json",
    log:
        "logs/refit_blocks/{key}/{part}-of-{parts}.log",
    benchmark:
        "work/benchmark/refit_blocks/{key}/{part}-of-{parts}.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: lambda wildcards: 8 if is_sequential(wildcards) else 4
    resources:
        mem_mb=lambda wildcards: 32000 if is_sequential(wildcards) else 8000,
        runtime=240,
        gpu=lambda wildcards: int(is_sequential(wildcards)),
    params:
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        step=lambda wildcards: (
            "sequential-refits --data results/data" if is_sequential(wildcards) else "refits"
        ),
        features=lambda wildcards: (
            CALIBRATION_CONFIG if is_sequential(wildcards) else "results/features"
        ),
        part=lambda wildcards: "" if is_sequential(wildcards) else f"--part {wildcards.part}",
        config=lambda wildcards: refitting(REFITTED[wildcards.key], int(wildcards.parts)),
        folder=folder_of("output"),
    message:
        "Refitting the kept units, part {wildcards.part}"
    shell:
        "python -m dgmr prune {params.step} --teacher {params.teacher} --orders {params.orders}"
        " --features {params.features:q} --config {params.config:q} {params.part}"
        " --output {params.folder} 2>&1 | tee {log}"


rule assemble:
    input:
        teacher=ancient(rules.teacher.output),
        orders=lambda wildcards: ancient(orders_of(KEYS[wildcards.results])),
        refits=lambda wildcards: ancient(refits_of(KEYS[wildcards.results])),
    output:
        touch("{results}/prune/{key}.stamp"),
    log:
        "logs/{results}/prune/{key}.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        refits=lambda wildcards, input: [f"--refits {path}" for path in input.refits],
        config=lambda wildcards: (
            KEYS[wildcards.results].params.prune.model_dump_json(exclude={"parts"})
        ),
        folder=folder_of("output"),
    message:
        "Assembling the pruned student, {params.folder}"
    shell:
        "python -m dgmr prune assemble --teacher {params.teacher} --orders {params.orders}"
        " {params.refits} --config {params.config:q} --output {params.folder} 2>&1 | tee {log}"


rule prune:
    input:
        model_stamp("results", "pruned"),
