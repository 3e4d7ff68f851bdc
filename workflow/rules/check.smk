# Check: what params.yaml alone cannot tell, before any work begins.


localrules:
    check,


# It goes first and alone: by priority and with all threads, not as an input of the rooms' first jobs.
# A repeated check must not repeat the work; and behind a job that is to be repeated Snakemake looks
# at no ancient() input's readers any more, so what else had changed would wait for a second run
# (snakemake issue 4166).
rule check:
    output:
        CHECKED,
    log:
        "logs/check.log",
    priority: 100
    conda:
        "../../envs/dgmr.yaml"
    threads: 64
    params:
        config=json.dumps(SHAPING | {"evaluate": {}}),
        targets=lambda wildcards: TARGETS,
        code=code("dgmr.check"),
    message:
        "Checking the models, the tables and the disk"
    shell:
        "python -m dgmr check --config {params.config:q} --targets {params.targets}"
        " --output {output} 2>&1 | tee {log}"
