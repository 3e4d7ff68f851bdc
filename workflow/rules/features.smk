# Features: the frozen teacher's outputs for every view of every sample, and calibration inputs.

TARGETS = f"work/features/{MAIN.targets}/targets"
CALIBRATION = f"work/features/{MAIN.calibration}/calibration"
CALIBRATION_CONFIG = PARAMS.features.model_dump_json(include={"calibration", "batch_size"})
CACHED = PARAMS.features.cache == "disk"


def all_targets(_wildcards):
    """Of all jobs. As a function, for Snakemake takes n^2 steps with a list of n files."""
    return ancient([f"{TARGETS}/{job}" for job in JOBS] if CACHED else [])


localrules:
    features,


rule targets:
    input:
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.data.output),
    output:
        directory(f"{TARGETS}/{{job}}"),
    log:
        "logs/targets/{job}.log",
    benchmark:
        f"work/benchmark/targets/{MAIN.targets}/{{job}}.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=240,
        gpu=1,
    params:
        shards=shards_of,
        config=PARAMS.features.model_dump_json(exclude={"calibration", "cache"}),
        teacher=folder_of("teacher"),
        data=folder_of("data"),
    message:
        "Asking the teacher about shards {params.shards}"
    shell:
        "python -m dgmr features targets {params.shards} --teacher {params.teacher}"
        " --data {params.data} --config {params.config:q} --output {output} 2>&1 | tee {log}"


rule calibration:
    input:
        teacher=ancient(rules.teacher.output),
        data=ancient(rules.data.output),
    output:
        directory(CALIBRATION),
    log:
        "logs/calibration.log",
    benchmark:
        f"work/benchmark/calibration/{MAIN.calibration}/calibration.tsv"
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=60,
        gpu=1,
    params:
        config=CALIBRATION_CONFIG,
        teacher=folder_of("teacher"),
        data=folder_of("data"),
    message:
        "Recording the inputs of every MLP"
    shell:
        "python -m dgmr features calibration --teacher {params.teacher} --data {params.data}"
        " --config {params.config:q} --output {output} 2>&1 | tee {log}"


rule features:
    input:
        teacher=ancient(rules.teacher.output),
        targets=all_targets,
        calibration=ancient(rules.calibration.output),
    output:
        touch(stamp("results/features", MAIN.features)),
    log:
        "logs/features.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=PARAMS.features.model_dump_json(exclude={"batch_size"}),
        teacher=folder_of("teacher"),
        folder=folder_of("output"),
    message:
        "Listing the features"
    shell:
        "python -m dgmr features publish {input.targets} --calibration {input.calibration}"
        " --teacher {params.teacher} --config {params.config:q} --output {params.folder}"
        " 2>&1 | tee {log}"
