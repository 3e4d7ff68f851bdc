# Features: the frozen teacher's outputs for every view of every sample, and calibration inputs.

ASKED = PARAMS.features.model_dump_json(exclude={"calibration", "cache"})
TARGETS_KEY = key(
    code("dgmr.features.targets"),
    # Other versions may draw other pixels, or compute with other kernels.
    versions("torch", "torchvision", "timm", "pillow"),
    TEACHER_KEY,
    DATA_KEY,
    ASKED,
)
TARGETS = f"work/features/{TARGETS_KEY}/targets"

CALIBRATION_CONFIG = PARAMS.features.model_dump_json(include={"calibration", "batch_size"})
CALIBRATION_KEY = key(code("dgmr.features.calibration"), TEACHER_KEY, DATA_KEY, CALIBRATION_CONFIG)
CALIBRATION = f"work/features/{CALIBRATION_KEY}/calibration"


localrules:
    features,


rule targets:
    input:
        teacher=rules.teacher.output,
        data=rules.data.output.manifest,
        shards=lambda wildcards: expand("results/data/{shard}.tar", shard=JOBS[wildcards.job]),
    output:
        directory(f"{TARGETS}/{{job}}"),
    log:
        "logs/targets/{job}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=240,
    params:
        shards=shards_of,
        config=ASKED,
        teacher=folder_of("teacher"),
        data=folder_of("data"),
    message:
        "Asking the teacher about shards {params.shards}"
    shell:
        "python -m dgmr features targets {params.shards} --teacher {params.teacher}"
        " --data {params.data} --config {params.config:q} --output {output} 2>&1 | tee {log}"


rule calibration:
    input:
        teacher=rules.teacher.output,
        data=rules.data.output.manifest,
        shards=rules.data.output.shards,
    output:
        directory(CALIBRATION),
    log:
        "logs/calibration.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=60,
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
        teacher=rules.teacher.output,
        targets=(expand(rules.targets.output, job=JOBS) if PARAMS.features.cache == "disk" else []),
        calibration=rules.calibration.output,
    output:
        manifest="results/features/manifest.json",
        metrics="results/features/metrics.json",
    log:
        "logs/features.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=PARAMS.features.model_dump_json(exclude={"batch_size"}),
        teacher=folder_of("teacher"),
        folder=folder_of("output"),
        code=code("dgmr.features.publish"),
    message:
        "Listing the features"
    shell:
        "python -m dgmr features publish {input.targets} --calibration {input.calibration}"
        " --teacher {params.teacher} --config {params.config:q} --output {params.folder}"
        " 2>&1 | tee {log}"
