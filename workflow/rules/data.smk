# Data: a table of image URLs becomes shards; labelled images become evaluation shards.

from glob import glob

# The one that envs/download.yaml pins; without conda, uv gives it an environment of its own.
IMG2DATASET = "img2dataset==1.47.0"

FROM_WEB = PARAMS.data.urls == "http"
DOWNLOAD = PARAMS.data.download

FASHION_TABLE = f"work/data/{key(code('dgmr.data.fashion_table'))}/table.parquet"
TABLE = PARAMS.data.table or FASHION_TABLE

SELECT_CONFIG = PARAMS.data.model_dump_json(exclude={"eval", "download", "image_size"})
SELECT_KEY = key(code("dgmr.data.select"), TABLE, SELECT_CONFIG)
SELECTION = f"work/data/{SELECT_KEY}/selection"

DOWNLOAD_KEY = key(SELECT_KEY, DOWNLOAD.model_dump_json())
PACK_KEY = key(code("dgmr.data.pack"), DOWNLOAD_KEY, PARAMS.data.image_size)
SHARDS = f"work/data/{PACK_KEY}/shards"

EVAL_CONFIG = PARAMS.data.eval.model_dump_json()
EVAL_KEY = key(code("dgmr.data.evaluation"), EVAL_CONFIG, PARAMS.data.shard_size)
EVALUATION = f"work/data/{EVAL_KEY}/eval"

# What shapes the training images: part of the keys of what is computed from them.
DATA_KEY = PACK_KEY


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


rule select_samples:
    input:
        sorted(glob(TABLE, recursive=True)) if PARAMS.data.table else TABLE,
    output:
        jobs=expand(f"{SELECTION}/{{job}}.parquet", job=JOBS),
        counts=f"{SELECTION}/selection.json",
    log:
        "logs/select_samples.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        table=lambda wildcards: TABLE,
        config=SELECT_CONFIG,
        folder=folder_of("output"),
    message:
        "Drawing the samples"
    shell:
        "python -m dgmr data select --table {params.table:q} --config {params.config:q}"
        " --output {params.folder} 2>&1 | tee {log}"


rule download_images:
    input:
        f"{SELECTION}/{{job}}.parquet",
    output:
        directory(f"work/data/{DOWNLOAD_KEY}/downloads/{{job}}"),
    log:
        "logs/download_images/{job}.log",
    conda:
        "../../envs/download.yaml"
    params:
        img2dataset=f"uv tool run --from {IMG2DATASET} img2dataset",
        shard_size=PARAMS.data.shard_size,
        download=DOWNLOAD,
    message:
        "Downloading the images of job {wildcards.job}"
    shell:
        "img2dataset=$(command -v img2dataset || echo {params.img2dataset});"
        " NO_ALBUMENTATIONS_UPDATE=1 $img2dataset"
        " --url_list {input} --input_format parquet --url_col url --caption_col caption"
        " --save_additional_columns '[\"sample_key\"]'"
        " --output_folder {output} --output_format webdataset"
        " --number_sample_per_shard {params.shard_size}"
        " --resize_mode no --skip_reencode True --enable_wandb False --processes_count 1"
        " --thread_count {params.download.threads} --timeout {params.download.timeout_s}"
        " --retries {params.download.retries} 2>&1 | tee {log}"


rule pack_shards:
    input:
        rows=f"{SELECTION}/{{job}}.parquet",
        downloaded=rules.download_images.output if FROM_WEB else [],
    output:
        directory(f"{SHARDS}/{{job}}"),
    log:
        "logs/pack_shards/{job}.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        shards=shards_of,
        table_folder=os.path.dirname(TABLE) or ".",
        downloaded=lambda wildcards, input: option("--downloaded", input.downloaded),
        image_size=option("--image-size", PARAMS.data.image_size),
    message:
        "Packing shards {params.shards}"
    shell:
        "python -m dgmr data pack {params.shards} --rows {input.rows} {params.downloaded}"
        " --table-folder {params.table_folder:q} {params.image_size} --output {output}"
        " 2>&1 | tee {log}"


rule pack_evaluation:
    output:
        directory(EVALUATION),
    log:
        "logs/pack_evaluation.log",
    localrule: PARAMS.data.eval.source == "fashion-mnist"
    conda:
        "../../envs/dgmr.yaml"
    params:
        config=EVAL_CONFIG,
        shard_size=PARAMS.data.shard_size,
    message:
        "Packing the evaluation images"
    shell:
        "python -m dgmr data evaluation --config {params.config:q} --shard-size {params.shard_size}"
        " --output {output} --downloads work/fashion-mnist 2>&1 | tee {log}"


rule data:
    input:
        jobs=expand(rules.pack_shards.output, job=JOBS),
        selection=rules.select_samples.output.counts,
    output:
        manifest="results/data/manifest.json",
        metrics="results/data/metrics.json",
        ledger="results/data/ledger.parquet",
        shards=expand("results/data/{shard}.tar", shard=PARAMS.data.shards),
    log:
        "logs/data.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        folder=folder_of("output"),
        code=code("dgmr.data.publish"),
    message:
        "Gathering the shards"
    shell:
        "python -m dgmr data publish {input.jobs} --selection {input.selection}"
        " --output {params.folder} 2>&1 | tee {log}"


rule evaluation_data:
    input:
        rules.pack_evaluation.output,
    output:
        "results/data/eval/manifest.json",
    log:
        "logs/evaluation_data.log",
    conda:
        "../../envs/dgmr.yaml"
    params:
        folder=folder_of("output"),
        code=code("dgmr.data.publish"),
    message:
        "Gathering the evaluation shards"
    shell:
        "python -m dgmr data publish-evaluation {input} --output {params.folder} 2>&1 | tee {log}"
