# Teacher: whatever timm can load becomes a model artefact.


localrules:
    teacher,


rule teacher:
    input:
        ancient(local_teacher_files()),
    output:
        touch(stamp("results/teacher", MAIN.teacher)),
    log:
        "logs/teacher.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=PARAMS.teacher.model_dump_json(),
        folder=folder_of("output"),
    message:
        "Bringing in the teacher"
    shell:
        "python -m dgmr teacher convert --config {params.config:q} --output {params.folder}"
        " 2>&1 | tee {log}"


# Not part of the chain: makes the teacher that the default params name. Without declared outputs,
# or Snakemake would take the files in git for something to be kept up to date.
rule train_demo_teacher:
    log:
        "logs/train_demo_teacher.log",
    conda:
        "../../envs/dgmr.yaml"
    threads: 2
    params:
        folder="resources/teachers/fashion-vit",
    message:
        "Training the demo teacher (about an hour on two cores)"
    shell:
        "python -m dgmr teacher train-demo --output {params.folder}"
        " --downloads work/fashion-mnist 2>&1 | tee {log}"
