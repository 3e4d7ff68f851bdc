# Report: one page, flat metrics for machines, and the student to take home.


# Each is asked for by itself: Snakemake makes nothing that only a room which is there was made from.
ROOMS = [
    rules.evaluation_data.output,
    rules.features.output,
    *(room for results in KEYS for room in rooms_of(results)),
]


localrules:
    report,
    report_point,


rule report:
    input:
        ancient(rooms_of("results")),
        points=ancient([report_of(f"results/sweep/{point}") for point in POINTS]),
    output:
        "results/report.html",
        "results/metrics.json",
        "results/curves.json",
        stamp=touch(report_of("results")),
    log:
        "logs/report.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=json.dumps(PARAMS.shaping() | {"sweep": PARAMS.sweep}),
        # Of DVC's rooms these two may have nothing in them, but are there.
        empty=["results/sweep", "results/track"],
    message:
        "Writing the report"
    shell:
        "mkdir -p {params.empty};"
        " python -m dgmr report --results results --config {params.config:q} 2>&1 | tee {log}"


# The same of a point of the sweep, which shares the rooms before the pruning with all others.
rule report_point:
    input:
        lambda wildcards: ancient(rooms_of(f"results/sweep/{wildcards.point}")),
    output:
        touch("results/sweep/{point}/student/{key}.stamp"),
    log:
        "logs/results/sweep/{point}/report-{key}.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=lambda wildcards: json.dumps(POINTS[wildcards.point].params.shaping()),
    message:
        "Writing the report of {wildcards.point}"
    shell:
        "python -m dgmr report --results results/sweep/{wildcards.point} --shared results"
        " --config {params.config:q} 2>&1 | tee {log}"
