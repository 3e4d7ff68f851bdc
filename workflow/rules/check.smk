# Check: what params.yaml alone cannot tell, before any work begins.

CHECKED = f"work/check/{MAIN.check}.json"
# Where all is done, as after a `dvc pull`, there is nothing to check.
CHECKED_FIRST = [] if os.path.exists(stamp("results/student", MAIN.report)) else CHECKED


localrules:
    check,


# It goes first and alone: by priority and with all threads, not as an input of the rooms' first jobs.
# A repeated check must not repeat the work, and behind a job that is to be repeated Snakemake looks
# at no reader of its ancient() outputs (snakemake issue 4166).
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
        config=json.dumps(PARAMS.shaping() | {"sweep": PARAMS.sweep}),
        targets=lambda wildcards: TARGETS,
    message:
        "Checking the models, the tables and the disk"
    shell:
        "python -m dgmr check --config {params.config:q} --targets {params.targets}"
        " --output {output} 2>&1 | tee {log}"
