# Distill: train the pruned student on the teacher's answers, stage after stage.

DISTILL = PARAMS.distill


localrules:
    distill,


# Only of stages that prune further before they begin.
rule prune_again:
    input:
        parent=lambda wildcards: artefact_of(parent_of(wildcards)),
        teacher=rules.teacher.output,
        orders=expand(rules.order_blocks.output, part=PARTS),
        data=rules.data.output.manifest,
        shards=rules.data.output.shards if COMPENSATES else [],
    output:
        expand("results/distill/pruned/{{stage}}/{file}", file=[*ARTEFACT, "blocks.json"]),
    log:
        "logs/prune_again/{stage}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=32000,
        runtime=240,
    params:
        parent=folder_of("parent"),
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        data=folder_of("data"),
        features=CALIBRATION_CONFIG,
        config=REFITTING,
        stage=lambda wildcards: STAGES[wildcards.stage].prune.model_dump_json(),
        folder=folder_of("output"),
        code=code("dgmr.prune.again"),
    message:
        "Pruning further, for stage {wildcards.stage}"
    shell:
        "python -m dgmr distill prune --parent {params.parent} --teacher {params.teacher}"
        " --orders {params.orders} --data {params.data} --features {params.features:q}"
        " --config {params.config:q} --stage {params.stage:q} --output {params.folder}"
        " 2>&1 | tee {log}"


# What says how a stage is run, not what comes out, is among the resources: a change reruns nothing.
rule distill_stage:
    input:
        parent=lambda wildcards: artefact_of(start_of(wildcards)),
        teacher=rules.teacher.output,
        data=rules.data.output.manifest,
        features=rules.features.output.manifest,
    output:
        expand("results/distill/{{stage}}/{file}", file=[*ARTEFACT, "history.json"]),
    log:
        "logs/distill/{stage}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=720,
        gpu=0,
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
        config=lambda wildcards: STAGES[wildcards.stage].model_dump_json(exclude={"prune"}),
        folder=folder_of("output"),
        code=code("dgmr.distill.trainer"),
    message:
        "Distilling, stage {wildcards.stage}"
    # Schedulers send SIGTERM to every process of a job: bash and tee outlast it, or the trainer would be
    # killed with the job before it has saved.
    shell:
        "trap : TERM INT; python -m dgmr distill train --stage {wildcards.stage} --parent {params.parent}"
        " --teacher {params.teacher} --data {params.data} --features {params.features}"
        " --config {params.config:q} --output {params.folder} --runs work/distill"
        " --gpus {resources.gpu} --nodes {resources.nodes} --processes {resources.processes}"
        " --workers {resources.workers} --shard-above {resources.shard_above}"
        " --checkpoint-every-s {resources.checkpoint_every_s}"
        " --max-bad-steps {resources.max_bad_steps} 2>&1 | (trap '' TERM INT; tee {log})"


rule distill:
    input:
        expand(rules.distill_stage.output, stage=STAGES),
