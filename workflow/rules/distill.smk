# Distill: train the pruned student on the teacher's cached outputs, stage after stage.


localrules:
    distill,


rule distill_stage:
    input:
        parent=lambda wildcards: artefact_of(parent_of(wildcards)),
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
    params:
        parent=folder_of("parent"),
        teacher=folder_of("teacher"),
        data=folder_of("data"),
        features=folder_of("features"),
        config=lambda wildcards: STAGES[wildcards.stage].model_dump_json(),
        folder=folder_of("output"),
        code=code("dgmr.distill.trainer"),
    message:
        "Distilling, stage {wildcards.stage}"
    shell:
        "python -m dgmr distill --stage {wildcards.stage} --parent {params.parent}"
        " --teacher {params.teacher} --data {params.data} --features {params.features}"
        " --config {params.config:q} --output {params.folder}"
        " 2>&1 | tee {log}"


rule distill:
    input:
        expand(rules.distill_stage.output, stage=STAGES),
