# Prune: order every block's hidden units, refit what is kept, assemble the student.

PRUNE = PARAMS.prune
PARTS = range(PRUNE.parts)

# Only the method taylor looks at the whole model at once.
SALIENCY_KEY = key(code("dgmr.prune.saliency"), CALIBRATION_KEY, PRUNE.seed)
SALIENCY = f"work/prune/{SALIENCY_KEY}/saliency"

ORDERING = PRUNE.model_dump_json(include=set(type(PRUNE).__base__.model_fields))
ORDERS_KEY = key(
    code("dgmr.prune.orders"),
    TEACHER_KEY,
    PRUNE.model_dump(include={"method", "seed", "tokens", "max_ratio"}),
    CALIBRATION_KEY if PRUNE.needs_calibration else None,
    SALIENCY_KEY if PRUNE.method == "taylor" else None,
)
ORDERS = f"work/prune/{ORDERS_KEY}/orders"

COMPENSATES = PRUNE.compensate == "least_squares"
REFITTING = PRUNE.model_dump_json(exclude={"method", "seed", "tokens"})
REFITS_KEY = key(
    code("dgmr.prune.refits"), ORDERS_KEY, CALIBRATION_KEY, PRUNE.model_dump(exclude={"parts"})
)
REFITS = f"work/prune/{REFITS_KEY}/refits"
REFIT_PARTS = range(1 if PRUNE.sequential else PRUNE.parts)


localrules:
    prune,


rule saliency:
    input:
        teacher=rules.teacher.output,
        data=rules.data.output.manifest,
        shards=rules.data.output.shards,
    output:
        directory(SALIENCY),
    log:
        "logs/saliency.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8
    resources:
        mem_mb=32000,
        runtime=240,
    params:
        teacher=folder_of("teacher"),
        data=folder_of("data"),
        config=CALIBRATION_CONFIG,
        seed=PRUNE.seed,
    message:
        "Scoring the hidden units by what the features lose"
    shell:
        "python -m dgmr prune saliency --teacher {params.teacher} --data {params.data}"
        " --features {params.config:q} --seed {params.seed} --output {output} 2>&1 | tee {log}"


rule order_blocks:
    input:
        teacher=rules.teacher.output,
        features=rules.features.output.manifest if PRUNE.needs_calibration else [],
        saliency=rules.saliency.output if PRUNE.method == "taylor" else [],
    output:
        f"{ORDERS}/part-{{part}}-of-{PRUNE.parts}.json",
    log:
        "logs/order_blocks/{part}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 4 if PRUNE.needs_calibration else 1
    resources:
        mem_mb=16000 if PRUNE.needs_calibration else 4000,
        runtime=240,
    params:
        teacher=folder_of("teacher"),
        config=ORDERING,
        features=option("--features", "results/features" if PRUNE.needs_calibration else None),
        saliency=option("--saliency", SALIENCY if PRUNE.method == "taylor" else None),
        folder=folder_of("output"),
    message:
        "Ordering the hidden units, part {wildcards.part}"
    shell:
        "python -m dgmr prune orders --teacher {params.teacher} --config {params.config:q}"
        " {params.features} {params.saliency} --part {wildcards.part} --output {params.folder}"
        " 2>&1 | tee {log}"


# Sequential refits follow one another, in one job that runs the whole model.
rule refit_blocks:
    input:
        teacher=rules.teacher.output,
        orders=expand(rules.order_blocks.output, part=PARTS),
        features=rules.features.output.manifest,
        data=rules.data.output.manifest if PRUNE.sequential else [],
        shards=rules.data.output.shards if PRUNE.sequential else [],
    output:
        f"{REFITS}/part-{{part}}-of-{len(REFIT_PARTS)}.json",
    log:
        "logs/refit_blocks/{part}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 8 if PRUNE.sequential else 4
    resources:
        mem_mb=32000 if PRUNE.sequential else 8000,
        runtime=240,
    params:
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        step="sequential-refits --data results/data" if PRUNE.sequential else "refits",
        features=CALIBRATION_CONFIG if PRUNE.sequential else folder_of("features"),
        part="" if PRUNE.sequential else "--part {part}",
        config=REFITTING,
        folder=folder_of("output"),
    message:
        "Refitting the kept units, part {wildcards.part}"
    shell:
        "python -m dgmr prune {params.step} --teacher {params.teacher} --orders {params.orders}"
        " --features {params.features:q} --config {params.config:q} {params.part}"
        " --output {params.folder} 2>&1 | tee {log}"


rule prune:
    input:
        teacher=rules.teacher.output,
        orders=expand(rules.order_blocks.output, part=PARTS),
        refits=expand(rules.refit_blocks.output, part=REFIT_PARTS) if COMPENSATES else [],
    output:
        expand("results/prune/{file}", file=[*ARTEFACT, "blocks.json"]),
    log:
        "logs/prune.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        refits=lambda wildcards, input: [f"--refits {path}" for path in input.refits],
        config=PRUNE.model_dump_json(exclude={"parts"}),
        folder=folder_of("output"),
        code=code("dgmr.prune.assemble"),
    message:
        "Assembling the pruned student"
    shell:
        "python -m dgmr prune assemble --teacher {params.teacher} --orders {params.orders}"
        " {params.refits} --config {params.config:q} --output {params.folder} 2>&1 | tee {log}"
