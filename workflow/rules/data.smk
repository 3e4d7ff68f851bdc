# Data: a table of image URLs becomes shards; labelled images become evaluation shards.

FROM_WEB = PARAMS.data.urls == "http"
DOWNLOAD = PARAMS.data.download

FASHION_TABLE = f"work/data/{MAIN.fashion_table}/table.parquet"
TABLE = PARAMS.data.table or FASHION_TABLE

SELECTION = f"work/data/{MAIN.selection}/selection"
DOWNLOADS = f"work/data/{MAIN.downloads}/downloads"
SHARDS = f"work/data/{MAIN.shards}/shards"
EVALUATION_SHARDS = f"work/data/{MAIN.evaluation_shards}/evaluation"


# Where jobs run there may be no internet: what fetches stays here.
localrules:
    data,
    download_images,
    evaluation_data,
    fashion_table,
    select_samples,


rule fashion_table:
    output:
        FASHION_TABLE,
    log:
        "logs/fashion_table.log",
    conda:
        "../../envs/dgmr.yaml"
    message:
        "Writing Fashion-MNIST as files and a table"
    shell:
        "python -m dgmr data fashion-table --output {output} --downloads work/fashion-mnist"
        " 2>&1 | tee {log}"


# Its tables, one a job, are not declared: Snakemake would look through all of them for each.
rule select_samples:
    input:
        ancient(MAIN.tables if PARAMS.data.table else TABLE),
    output:
        f"{SELECTION}/selection.json",
    log:
        "logs/select_samples.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        table=lambda wildcards: TABLE,
        config=PARAMS.data.model_dump_json(exclude={"eval", "download", "image_size"}),
        folder=folder_of("output"),
    message:
        "Drawing the samples"
    shell:
        "python -m dgmr data select --table {params.table:q} --config {params.config:q}"
        " --output {params.folder} 2>&1 | tee {log}"


rule download_images:
    input:
        ancient(rules.select_samples.output),
    output:
        directory(f"{DOWNLOADS}/{{job}}"),
    log:
        "logs/download_images/{job}.log",
    conda:
        "../../envs/download.yaml"
    params:
        rows=f"{SELECTION}/{{job}}.parquet",
        # The one that envs/download.yaml pins; without conda, uv gives it an environment of its own.
        img2dataset="uv tool run --from img2dataset==1.47.0 img2dataset",
        shard_size=PARAMS.data.shard_size,
        download=DOWNLOAD,
    message:
        "Downloading the images of job {wildcards.job}"
    # Under another name at first, as all that is written here.
    shell:
        "rm -rf {output}.partial;"
        " img2dataset=$(command -v img2dataset || echo {params.img2dataset});"
        " NO_ALBUMENTATIONS_UPDATE=1 $img2dataset"
        " --url_list {params.rows} --input_format parquet --url_col url --caption_col caption"
        " --save_additional_columns '[\"sample_key\"]'"
        " --output_folder {output}.partial --output_format webdataset"
        " --number_sample_per_shard {params.shard_size}"
        " --resize_mode no --skip_reencode True --enable_wandb False --processes_count 1"
        " --thread_count {params.download.threads} --timeout {params.download.timeout_s}"
        " --retries {params.download.retries} 2>&1 | tee {log};"
        " mv {output}.partial {output}"


rule pack_shards:
    input:
        selection=ancient(rules.select_samples.output),
        downloaded=ancient(rules.download_images.output if FROM_WEB else []),
    output:
        directory(f"{SHARDS}/{{job}}"),
    log:
        "logs/pack_shards/{job}.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        shards=shards_of,
        rows=f"{SELECTION}/{{job}}.parquet",
        table_folder=os.path.dirname(TABLE) or ".",
        downloaded=lambda wildcards, input: option("--downloaded", input.downloaded),
        image_size=option("--image-size", PARAMS.data.image_size),
    message:
        "Packing shards {params.shards}"
    shell:
        "python -m dgmr data pack {params.shards} --rows {params.rows} {params.downloaded}"
        " --table-folder {params.table_folder:q} {params.image_size} --output {output}"
        " 2>&1 | tee {log}"


rule pack_evaluation:
    output:
        directory(EVALUATION_SHARDS),
    log:
        "logs/pack_evaluation.log",
    localrule: PARAMS.data.eval.source == "fashion-mnist"
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=PARAMS.data.eval.model_dump_json(),
        shard_size=PARAMS.data.shard_size,
    message:
        "Packing the evaluation images"
    shell:
        "python -m dgmr data evaluation --config {params.config:q} --shard-size {params.shard_size}"
        " --output {output} --downloads work/fashion-mnist 2>&1 | tee {log}"


rule data:
    input:
        jobs=lambda wildcards: ancient([f"{SHARDS}/{job}" for job in JOBS]),
        selection=ancient(rules.select_samples.output),
    output:
        touch(stamp("results/data", MAIN.data)),
    log:
        "logs/data.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        folder=folder_of("output"),
    message:
        "Gathering the shards"
    shell:
        "python -m dgmr data publish {input.jobs} --selection {input.selection}"
        " --output {params.folder} 2>&1 | tee {log}"


rule evaluation_data:
    input:
        ancient(rules.pack_evaluation.output),
    output:
        touch(stamp("results/evaluation_data", MAIN.evaluation_data)),
    log:
        "logs/evaluation_data.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        folder=folder_of("output"),
    message:
        "Gathering the evaluation shards"
    shell:
        "python -m dgmr data publish-evaluation {input} --output {params.folder} 2>&1 | tee {log}"
