# Evaluate: accuracy, agreement with the teacher, size and speed of every model in the chain.

# By the key of a score: the run and the model it is of. Of the runs that share it one that is made, lest
# the points of a sweep wait for the main run's rooms, or it for theirs.
SCORES = {
    keys.evaluation(model): (results, model)
    for model in MAIN.models
    for results, keys in made_last([model])
}
SPEEDS = {keys.speed: results for results, keys in made_last(MAIN.models)}


localrules:
    evaluate,
    gather,


rule evaluate_model:
    input:
        lambda wildcards: ancient(model_stamp(*SCORES[wildcards.key])),
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.evaluation_data.output),
    output:
        "work/evaluate/accuracy/{key}.json",
    log:
        "logs/evaluate/{key}.log",
    benchmark:
        "work/benchmark/evaluate_model/{key}/evaluate.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=240,
        gpu=1,
    params:
        name=lambda wildcards: SCORES[wildcards.key][1],
        model=lambda wildcards: folder_of_model(*SCORES[wildcards.key]),
        teacher=folder_of("teacher"),
        data=folder_of("data"),
        config=PARAMS.evaluate.model_dump_json(include={"batch_size"}),
    message:
        "Evaluating {params.model}"
    shell:
        "python -m dgmr evaluate model --name {params.name} --model {params.model}"
        " --teacher {params.teacher} --data {params.data} --config {params.config:q}"
        " --output {output} 2>&1 | tee {log}"


# All threads, and no teller beside it, which takes none: nothing else may run while speed is measured.
rule measure_speed:
    input:
        lambda wildcards: ancient(
            model_stamp(SPEEDS[wildcards.key], model) for model in MAIN.models
        ),
    output:
        "work/evaluate/speed/{key}.json",
    log:
        "logs/speed/{key}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 64
    resources:
        mem_mb=16000,
        runtime=60,
        gpu=1,
        mlflow=1,
    params:
        models=lambda wildcards: named_models(SPEEDS[wildcards.key]),
        config=PARAMS.evaluate.model_dump_json(exclude={"batch_size"}),
    message:
        "Measuring the speed of all models, side by side"
    shell:
        "python -m dgmr evaluate speed {params.models} --config {params.config:q}"
        " --output {output} 2>&1 | tee {log}"


rule gather:
    input:
        lambda wildcards: ancient(scores_of(wildcards.results).values()),
        speed=lambda wildcards: ancient(f"work/evaluate/speed/{KEYS[wildcards.results].speed}.json"),
    output:
        touch("{results}/evaluate/{key}.stamp"),
    log:
        "logs/{results}/evaluate/{key}.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        scores=lambda wildcards: [
            f"{name}={path}" for name, path in scores_of(wildcards.results).items()
        ],
        folder=folder_of("output"),
    message:
        "Gathering the scores, {params.folder}"
    shell:
        "python -m dgmr evaluate gather {params.scores} --speed {input.speed}"
        " --output {params.folder} 2>&1 | tee {log}"


rule evaluate:
    input:
        stamp("results/evaluate", MAIN.evaluate),
