# Distill: train the pruned student on the teacher's answers, stage after stage.

DISTILL = PARAMS.distill


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
    """The same stage of a run before, from whose checkpoints this one ends at once; side by side, both
    would write them."""
    before = list(KEYS)[: list(KEYS).index(wildcards.results)]
    alike = [run for run in before if KEYS[run].distill(wildcards.stage) == wildcards.key]
    return ancient([model_stamp(run, wildcards.stage) for run in alike[-1:]])


localrules:
    distill,


# Only of stages that prune further before they begin.
rule prune_again:
    input:
        parent=parent_of,
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.data.output),
        orders=lambda wildcards: ancient(orders_of(KEYS[wildcards.results])),
    output:
        touch("{results}/distill/pruned/{stage}/{key}.stamp"),
    log:
        "logs/{results}/prune_again/{stage}-{key}.log",
    benchmark:
        "work/benchmark/prune_again/{results}/{stage}-{key}.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=32000,
        runtime=240,
        gpu=1,
    params:
        parent=folder_of("parent"),
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        data=folder_of("data"),
        features=CALIBRATION_CONFIG,
        config=lambda wildcards: (
            refitting(KEYS[wildcards.results], KEYS[wildcards.results].params.prune.parts)
        ),
        stage=lambda wildcards: stage_of(wildcards).prune.model_dump_json(),
        folder=folder_of("output"),
    message:
        "Pruning further, for stage {wildcards.stage}"
    shell:
        "python -m dgmr distill prune --parent {params.parent} --teacher {params.teacher}"
        " --orders {params.orders} --data {params.data} --features {params.features:q}"
        " --config {params.config:q} --stage {params.stage:q} --output {params.folder}"
        " 2>&1 | tee {log}"


# What says how a stage is run, not what comes out, is among the resources.
rule distill_stage:
    input:
        trained_alike,
        parent=start_of,
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.data.output),
        features=ancient(rules.features.output),
        targets=all_targets,
    output:
        touch("{results}/distill/{stage}/{key}.stamp"),
    log:
        "logs/{results}/distill/{stage}-{key}.log",
    benchmark:
        "work/benchmark/distill_stage/{results}/{stage}-{key}.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=720,
        gpu=1,
        processes=DISTILL.processes,
        workers="auto" if DISTILL.workers is None else str(DISTILL.workers),
        shard_above=DISTILL.shard_above,
        checkpoint_every_s=DISTILL.checkpoint_every_s,
        max_bad_steps=DISTILL.max_bad_steps,
    params:
        parent=folder_of("parent"),
        teacher=folder_of("teacher"),
        data=folder_of("data"),
        features=folder_of("features"),
        config=lambda wildcards: stage_of(wildcards).model_dump_json(exclude={"prune"}),
        folder=folder_of("output"),
    message:
        "Distilling, stage {wildcards.stage}"
    shell:
        "python -m dgmr distill train --stage {wildcards.stage} --parent {params.parent}"
        " --teacher {params.teacher} --data {params.data} --features {params.features}"
        " --config {params.config:q} --output {params.folder} --runs work/distill/{wildcards.key}"
        " --gpus {resources.gpu} --processes {resources.processes} --workers {resources.workers}"
        " --shard-above {resources.shard_above}"
        " --checkpoint-every-s {resources.checkpoint_every_s}"
        " --max-bad-steps {resources.max_bad_steps} 2>&1 | tee {log}"


rule distill:
    input:
        [model_stamp("results", stage) for stage in STAGES],
