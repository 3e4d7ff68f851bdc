# Distill: train the pruned student on the teacher's answers, stage after stage.

DISTILL = PARAMS.distill


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
        "work/benchmark/prune_again/{key}/{results}/{stage}.tsv"
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
        "work/benchmark/distill_stage/{key}/{results}/{stage}.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=720,
        gpu=1,
        nodes=1,
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
    # Schedulers send SIGTERM to every process of a job: bash and tee outlast it, or the trainer would be
    # killed with the job before it has saved.
    shell:
        "trap : TERM INT; python -m dgmr distill train --stage {wildcards.stage} --parent {params.parent}"
        " --teacher {params.teacher} --data {params.data} --features {params.features}"
        " --config {params.config:q} --output {params.folder} --runs work/distill/{wildcards.key}"
        " --gpus {resources.gpu} --nodes {resources.nodes} --processes {resources.processes}"
        " --workers {resources.workers} --shard-above {resources.shard_above}"
        " --checkpoint-every-s {resources.checkpoint_every_s}"
        " --max-bad-steps {resources.max_bad_steps} 2>&1 | (trap '' TERM INT; tee {log})"


rule distill:
    input:
        ancient(rooms_of_stages("results")),
    output:
        touch(stamp("results/distill", MAIN.distilled)),
    log:
        "logs/distill.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        folder=folder_of("output"),
        kept=lambda wildcards, input: [os.path.dirname(stage) for stage in input],
    message:
        "Leaving nothing but these stages in {params.folder}"
    shell:
        "python -m dgmr tidy {params.folder} {params.kept} 2>&1 | tee {log}"
