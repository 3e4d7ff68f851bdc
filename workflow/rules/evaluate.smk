# Evaluate: accuracy, agreement with the teacher, size and speed of every model in the chain.

EVALUATE_CONFIG = PARAMS.evaluate.model_dump_json(include={"batch_size"})
SPEED_CONFIG = PARAMS.evaluate.model_dump_json(exclude={"batch_size"})


localrules:
    evaluate,


rule evaluate_model:
    input:
        model=lambda wildcards: artefact_of(FOLDERS[wildcards.model]),
        teacher=rules.teacher.output,
        data=rules.evaluation_data.output,
    output:
        "results/evaluate/{model}.json",
    log:
        "logs/evaluate/{model}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        model=folder_of("model"),
        teacher=folder_of("teacher"),
        data=folder_of("data"),
        config=EVALUATE_CONFIG,
        code=code("dgmr.evaluate.accuracy"),
    message:
        "Evaluating {wildcards.model}"
    shell:
        "python -m dgmr evaluate model --name {wildcards.model} --model {params.model}"
        " --teacher {params.teacher} --data {params.data} --config {params.config:q}"
        " --output {output} 2>&1 | tee {log}"


# All threads: nothing else may run while speed is measured.
rule measure_speed:
    input:
        [artefact_of(folder) for folder in FOLDERS.values()],
    output:
        "results/evaluate/speed.json",
    log:
        "logs/evaluate/speed.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 64
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        models=[f"{name}={folder}" for name, folder in FOLDERS.items()],
        config=SPEED_CONFIG,
        code=code("dgmr.evaluate.speed"),
    message:
        "Measuring the speed of all models, side by side"
    shell:
        "python -m dgmr evaluate speed {params.models} --config {params.config:q}"
        " --output {output} 2>&1 | tee {log}"


rule evaluate:
    input:
        expand(rules.evaluate_model.output, model=FOLDERS),
        rules.measure_speed.output,
