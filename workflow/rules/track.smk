# Track: MLflow is told what each room's files say, as soon as the room is done.

ROOMS = {
    "teacher": rules.teacher.output,
    "data": rules.data.output.metrics,
    "features": rules.features.output.metrics,
    "prune": rules.prune.output,
    **{f"distill/{stage}": expand(rules.distill_stage.output, stage=stage) for stage in STAGES},
    "evaluate": rules.evaluate.input,
    "report": rules.report.output,
}
TRACK_CONFIG = json.dumps(SHAPING | {"mlflow": PARAMS.mlflow.model_dump()})
TRACK_KEY = key(code("dgmr.track.tell"), TRACK_CONFIG)
TRACKED = (
    expand(f"work/track/{TRACK_KEY}/{{room}}.json", room=ROOMS)
    if PARAMS.mlflow.tracking_uri
    else []
)


localrules:
    track,


wildcard_constraints:
    room="|".join(ROOMS),


# No core of its own, and behind all others on theirs: no stage waits for the store.
rule track:
    input:
        lambda wildcards: ROOMS[wildcards.room],
    output:
        f"work/track/{TRACK_KEY}/{{room}}.json",
    log:
        "logs/track/{room}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 0
    params:
        config=TRACK_CONFIG,
    message:
        "Telling MLflow about {wildcards.room}"
    shell:
        "nice -n 19 python -m dgmr track room {wildcards.room} --results results"
        " --config {params.config:q} --output {output} 2>&1 | tee {log}"
