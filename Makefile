# Each target does everything from a bare checkout: it makes .venv, installs the tested versions and runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Training allocates and frees the same large blocks at every step, and the matrix library compiles one kernel per shape.
TRAIN_ENV := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_ARENA_MAX=1 \
	ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192
RECIPE := benchmarks/recipes/reference_model
RECIPE_MODULE := benchmarks.recipes.reference_model

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint types reference-model mixtral-model data-dir clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-16s %s\n", $$1, $$2}'

quickstart: .venv/.installed ## quantize the bundled MoE at 3 and 4 bits and print the comparison (minutes)
	@.venv/bin/python -m benchmarks.quickstart
	@echo "Curves and figures: .venv/bin/tensorboard --logdir runs/quickstart"

test: .venv/.installed ## run the whole test suite
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q --durations=10

lint: .venv/.installed ## check style and formatting
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: .venv/.installed ## check types
	@.venv/bin/mypy

reference-model: data-dir .venv/.installed ## train (or continue) the bundled MoE, write its card: DATA_DIR=folder of the data
	@$(TRAIN_ENV) .venv/bin/python -m $(RECIPE_MODULE).train fit --config $(RECIPE)/config.yaml \
		--data.data_dir "$(DATA_DIR)" --ckpt_path last
	@.venv/bin/python -m $(RECIPE_MODULE).texts --data-dir "$(DATA_DIR)"
	@.venv/bin/python -m $(RECIPE_MODULE).card --checkpoint runs/reference_model/checkpoints/last.ckpt --data-dir "$(DATA_DIR)"

mixtral-model: data-dir .venv/.installed ## train (or continue) a second MoE into runs/mixtral_moe/model: DATA_DIR=folder of the data
	@$(TRAIN_ENV) OMP_NUM_THREADS=1 .venv/bin/python -m $(RECIPE_MODULE).train fit --config $(RECIPE)/config_mixtral.yaml \
		--data.data_dir "$(DATA_DIR)" --ckpt_path last
	@.venv/bin/python -m $(RECIPE_MODULE).save --checkpoint runs/mixtral_moe/checkpoints/last.ckpt \
		--tokenizer runs/mixtral_moe/data --output runs/mixtral_moe/model

clean: ## remove the virtual environment and caches (runs/ is kept)
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

data-dir:
	@test -n "$(DATA_DIR)" || { echo "DATA_DIR is not set; give the folder of the data sets, laid out as \
	$(RECIPE)/README.md says: make $(firstword $(MAKECMDGOALS)) DATA_DIR=path" | tr -d '\t' >&2; exit 2; }
	@test -d "$(DATA_DIR)" || { echo "DATA_DIR ($(DATA_DIR)) is not a folder" >&2; exit 2; }

# torch goes first and alone: whatever build pip is configured to find (CPU or CUDA) is the one that is kept.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11 or newer, or set PYTHON=path" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moeq needs Python 3.11 or newer, \
	but $(PYTHON) is %d.%d; set PYTHON=path" % sys.version_info[:2])'
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@
