# Check: what params.yaml alone cannot tell, before any work begins.


localrules:
    check,


# Every room's first jobs wait for the check. They take its output as ancient: a repeated check
# must not repeat the work.
rule check:
    output:
        CHECKED,
    log:
        "logs/check.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        teacher=PARAMS.teacher.model_dump_json(),
        data=PARAMS.data.model_dump_json(),
        prune=PARAMS.prune.model_dump_json(),
        code=code("dgmr.check"),
    message:
        "Checking the model and the tables"
    shell:
        "python -m dgmr check --teacher {params.teacher:q} --data {params.data:q}"
        " --prune {params.prune:q} --output {output} 2>&1 | tee {log}"
