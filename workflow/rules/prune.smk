# Prune: order every block's hidden neurons, refit what is kept, assemble the student.

ORDERS_KEY = key(code("dgmr.prune.orders"), TEACHER_KEY, PARAMS.prune.max_ratio)
ORDERS = f"work/prune/{ORDERS_KEY}/orders"

COMPENSATES = PARAMS.prune.compensate == "least_squares"
REFITS_KEY = key(
    code("dgmr.prune.refits"),
    ORDERS_KEY,
    CALIBRATION_KEY,
    PARAMS.prune.ratio,
    PARAMS.prune.ridge,
)
REFITS = f"work/prune/{REFITS_KEY}/refits"
PARTS = range(PARAMS.prune.parts)


localrules:
    prune,


rule order_blocks:
    input:
        teacher=rules.teacher.output,
    output:
        f"{ORDERS}/part-{{part}}-of-{PARAMS.prune.parts}.json",
    log:
        "logs/order_blocks/{part}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        teacher=folder_of("teacher"),
        max_ratio=PARAMS.prune.max_ratio,
        parts=PARAMS.prune.parts,
        folder=folder_of("output"),
    message:
        "Ordering the hidden neurons, part {wildcards.part}"
    shell:
        "python -m dgmr prune orders --teacher {params.teacher} --max-ratio {params.max_ratio}"
        " --part {wildcards.part} --parts {params.parts} --output {params.folder}"
        " 2>&1 | tee {log}"


rule refit_blocks:
    input:
        teacher=rules.teacher.output,
        orders=expand(rules.order_blocks.output, part=PARTS),
        features=rules.features.output.manifest,
    output:
        f"{REFITS}/part-{{part}}-of-{PARAMS.prune.parts}.json",
    log:
        "logs/refit_blocks/{part}.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        teacher=folder_of("teacher"),
        features=folder_of("features"),
        orders=folder_of("orders"),
        ratio=PARAMS.prune.ratio,
        ridge=PARAMS.prune.ridge,
        parts=PARAMS.prune.parts,
        folder=folder_of("output"),
    message:
        "Refitting the kept neurons, part {wildcards.part}"
    shell:
        "python -m dgmr prune refits --teacher {params.teacher} --orders {params.orders}"
        " --features {params.features} --ratio {params.ratio} --ridge {params.ridge}"
        " --part {wildcards.part} --parts {params.parts} --output {params.folder}"
        " 2>&1 | tee {log}"


rule prune:
    input:
        teacher=rules.teacher.output,
        orders=expand(rules.order_blocks.output, part=PARTS),
        refits=expand(rules.refit_blocks.output, part=PARTS) if COMPENSATES else [],
    output:
        expand("results/prune/{file}", file=[*ARTEFACT, "blocks.json"]),
    log:
        "logs/prune.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        teacher=folder_of("teacher"),
        orders=folder_of("orders"),
        refits=(
            [f"--refits {path}" for path in expand(rules.refit_blocks.output, part=PARTS)]
            if COMPENSATES
            else []
        ),
        ratio=PARAMS.prune.ratio,
        folder=folder_of("output"),
        code=code("dgmr.prune.assemble"),
    message:
        "Assembling the pruned student"
    shell:
        "python -m dgmr prune assemble --teacher {params.teacher} --orders {params.orders}"
        " {params.refits} --ratio {params.ratio} --output {params.folder} 2>&1 | tee {log}"
