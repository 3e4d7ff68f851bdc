# Report: one page, flat metrics for machines, and the student to take home.


localrules:
    report,


rule report:
    input:
        rules.teacher.output,
        rules.data.output.metrics,
        rules.prune.output,
        rules.distill.input,
        rules.evaluate.input,
    output:
        "results/report.html",
        "results/metrics.json",
        "results/curves.json",
        expand("results/student/{file}", file=[*ARTEFACT, "README.md"]),
    log:
        "logs/report.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=json.dumps(SHAPING),
        results=folder_of("output"),
        code=code("dgmr.report.page"),
    message:
        "Writing the report"
    shell:
        "python -m dgmr report --results {params.results} --config {params.config:q} 2>&1 | tee {log}"
