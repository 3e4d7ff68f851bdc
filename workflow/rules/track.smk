# Track: MLflow is told what each room's files say, as soon as the room is done.

MADE_ONCE = {
    "teacher": rules.teacher.output,
    "data": rules.data.output,
    "features": rules.features.output,
}
TRACKED = {
    results: [
        f"{results}/track/{room}/{keys.tracked(room)}.json"
        for room in stamps_to_track(results)
        if PARAMS.mlflow.tracking_uri
    ]
    for results, keys in KEYS.items()
}


localrules:
    track,
    sweep,


wildcard_constraints:
    room="|".join(stamps_to_track("results")),


# No core of its own, and behind all others on theirs: no stage waits for the store, but that which measures
# speed, for one teller.
rule track:
    input:
        lambda wildcards: ancient(stamps_to_track(wildcards.results)[wildcards.room]),
    output:
        "{results}/track/{room}/{key}.json",
    log:
        "logs/{results}/track/{room}-{key}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 0
    resources:
        mlflow=1,
    params:
        folder=folder_of("output"),
        config=lambda wildcards: KEYS[wildcards.results].params.model_dump_json(),
        point=lambda wildcards: option("--point", wildcards.results.partition("/sweep/")[2]),
    message:
        "Telling MLflow about {wildcards.results}, {wildcards.room}"
    shell:
        "rm -f {params.folder}/*.json;"
        " nice -n 19 python -m dgmr track room {wildcards.room} --results {wildcards.results}"
        " --config {params.config:q} {params.point} --output {output} 2>&1 | tee {log}"


# The chain asks for the points themselves; this is DVC's, which versions the folder as a whole.
rule sweep:
    input:
        ancient([report_of(f"results/sweep/{point}") for point in POINTS]),
        ancient([TRACKED[f"results/sweep/{point}"] for point in POINTS]),
    output:
        touch(stamp("results/sweep", MAIN.sweep)),
    log:
        "logs/sweep.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        folder=folder_of("output"),
        kept=[f"results/sweep/{point}" for point in POINTS],
    message:
        "Leaving nothing but these points in {params.folder}"
    shell:
        "python -m dgmr tidy {params.folder} {params.kept} 2>&1 | tee {log}"
