# make help lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin

# pip, not uv: it takes torch from where the machine keeps it.
.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.PHONY: help install run test test-rerun test-prune test-resume test-distributed test-enospc test-slurm test-mlflow test-kill test-dvc lint ui demo-teacher schema lock bench-dag bench-distill bench-prune bench-methods bench-minilm

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

install: .venv/installed ## Make .venv from requirements.lock.

run: install ## Run the chain with params.yaml.
	$(BIN)/snakemake --cores all

test: install lint ## Lint, then all tests but the heavy suites.
	$(BIN)/python -m pytest -m "not slow"

lint: install ## ruff, snakefmt, snakemake --lint, mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow/rules
	$(BIN)/snakemake --lint
	$(BIN)/mypy

ui: install ## Open MLflow's pages on what was logged.
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

demo-teacher: install ## Train the demo teacher anew (about an hour on two cores).
	$(BIN)/snakemake --cores all train_demo_teacher

bench-distill: install ## The feature cache, the trainer and the recipes; last line JSON (half an hour).
	$(BIN)/snakemake --cores all --quiet all -- distill
	$(BIN)/python benchmarks/distill.py

bench-dag: install ## Seconds and memory of planning a run of the paper's size; last line JSON.
	$(BIN)/python benchmarks/dag.py

bench-prune: install ## The prune room's speed, memory and error; last line JSON (45 minutes, 25 GB of disk).
	$(BIN)/snakemake --cores all --quiet all -- data evaluation_data
	$(BIN)/python benchmarks/prune.py

bench-methods: install ## Every selection method with every compensation on the demo teacher.
	$(BIN)/snakemake --cores all --quiet all -- data evaluation_data
	$(BIN)/python benchmarks/methods.py

bench-minilm: install ## The selection methods on a pretrained text encoder, which is downloaded.
	$(BIN)/python benchmarks/minilm.py

test-prune: install ## The prune room's proofs at full size (30 minutes, 25 GB of disk).
	$(BIN)/python -m pytest -m "slow or not slow" tests/prune

test-resume: install ## Training killed at random moments ends bit by bit as if it had not been.
	$(BIN)/python -m pytest -m "slow or not slow" tests/distill/test_resume.py

test-kill: install ## The whole chain killed a hundred times ends at the same files (half an hour).
	$(BIN)/python -m pytest -m "slow or not slow" -s tests/workflow/test_kill_loop.py tests/workflow/test_killed.py

test-distributed: install ## Several processes train as one does.
	$(BIN)/python -m pytest -m "slow or not slow" tests/distill/test_distributed.py

test-rerun: install ## What every change reruns: exactly what depends on it.
	$(BIN)/python -m pytest tests/workflow/test_rerun.py tests/test_keys.py

test-enospc: install ## Every step that makes files, on a full disk, write by write (15 minutes).
	$(BIN)/python -m pytest -s -m "slow or not slow" tests/full_disk

test-slurm: install ## The chain through a Slurm of its own, and what Slurm does to jobs (root; apt: slurm-wlm munge; 12 minutes).
	$(BIN)/python -m pytest -m "slow or not slow" tests/cluster

test-mlflow: install ## Tellers killed at random leave MLflow as the files say (15 minutes).
	$(BIN)/python -m pytest -m "slow or not slow" tests/track

test-dvc: install ## DVC and Snakemake agree, whatever is toggled, checked out, pulled or linked.
	$(BIN)/python -m pytest -m "slow or not slow" tests/workflow/test_dvc.py

schema: install ## Write workflow/schemas/params.schema.json from dgmr.params.
	$(BIN)/dgmr schema > workflow/schemas/params.schema.json

lock: install ## Write requirements.lock from what is installed.
	{ echo "# Exact versions of everything; pyproject.toml has the ranges. Made by: make lock"; \
	  $(BIN)/pip freeze --exclude-editable --disable-pip-version-check; } > requirements.lock
