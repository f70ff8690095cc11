# Each target does everything from a bare checkout: it makes .venv, installs the tested versions and runs.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
# Bytecode is written by what imports a module first, which takes less than compiling all that is installed.  Where the
# environment forbids it, every process would compile what it imports: a third of the time that one takes to start.
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip install -qq --disable-pip-version-check --no-compile
CONSTRAINTS ?= constraints.txt
# One thread for each worker, one worker for each core; a worker holds up to 2 GiB.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 4 ] && n=4; echo $$n)
PYTEST := -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Training allocates and frees the same large blocks at every step, and the matrix library compiles one kernel per shape.
TRAIN_ENV := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_ARENA_MAX=1 \
	ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192
RECIPE := benchmarks/recipes/reference_model
RECIPE_MODULE := benchmarks.recipes.reference_model

.DEFAULT_GOAL := help
.PHONY: help quickstart check test test-minimum lint types reference-model mixtral-model data-dir clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-16s %s\n", $$1, $$2}'

quickstart: .venv/.running ## quantize the bundled MoE at 3 and 4 bits and print the comparison (minutes)
	@.venv/bin/python -m benchmarks.quickstart
	@echo "Curves and figures: .venv/bin/tensorboard --logdir runs/quickstart"

check: .venv/.testing ## run what an edit needs of the test suite (under two minutes on two cores)
	@OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) -m "not slow"

test: .venv/.testing ## run the whole test suite
	@OMP_NUM_THREADS=1 .venv/bin/python $(PYTEST) --durations=10

test-minimum: .venv-minimum/.installed ## run what an edit needs with the oldest versions that pyproject.toml allows
	@OMP_NUM_THREADS=1 .venv-minimum/bin/python $(PYTEST) -m "not slow"

lint: .venv/.testing ## check style and formatting
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: .venv/.testing ## check types
	@.venv/bin/mypy

reference-model: data-dir .venv/.running ## train (or continue) the bundled MoE, write its card: DATA_DIR=folder of the data
	@$(TRAIN_ENV) .venv/bin/python -m $(RECIPE_MODULE).train fit --config $(RECIPE)/config.yaml \
		--data.data_dir "$(DATA_DIR)" --ckpt_path last
	@.venv/bin/python -m $(RECIPE_MODULE).texts --data-dir "$(DATA_DIR)"
	@.venv/bin/python -m $(RECIPE_MODULE).card --checkpoint runs/reference_model/checkpoints/last.ckpt --data-dir "$(DATA_DIR)"

mixtral-model: data-dir .venv/.running ## train (or continue) a second MoE into runs/mixtral_moe/model: DATA_DIR=folder of the data
	@$(TRAIN_ENV) OMP_NUM_THREADS=1 .venv/bin/python -m $(RECIPE_MODULE).train fit --config $(RECIPE)/config_mixtral.yaml \
		--data.data_dir "$(DATA_DIR)" --ckpt_path last
	@.venv/bin/python -m $(RECIPE_MODULE).save --checkpoint runs/mixtral_moe/checkpoints/last.ckpt \
		--tokenizer runs/mixtral_moe/data --output runs/mixtral_moe/model

clean: ## remove the virtual environment and caches (runs/ is kept)
	@rm -rf .venv .venv-minimum .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

data-dir:
	@test -n "$(DATA_DIR)" || { echo "DATA_DIR is not set; give the folder of the data sets, laid out as \
	$(RECIPE)/README.md says: make $(firstword $(MAKECMDGOALS)) DATA_DIR=path" | tr -d '\t' >&2; exit 2; }
	@test -d "$(DATA_DIR)" || { echo "DATA_DIR ($(DATA_DIR)) is not a folder" >&2; exit 2; }

# Two stages: what running needs, then what the tests compare with (the evaluation harness brings dozens of packages).
# One call of pip finds whatever build of torch it is configured to find (CPU or CUDA) among those of the pinned version.
.venv/.running: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11 or newer, or set PYTHON=path" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moeq needs Python 3.11 or newer, \
	but $(PYTHON) is %d.%d; set PYTHON=path" % sys.version_info[:2])'
	@echo "Installing into .venv (a minute or two the first time)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) -c $(CONSTRAINTS) -e .
	@touch $@

.venv/.testing: .venv/.running
	@echo "Installing what the tests need into .venv (a few minutes the first time)"
	@.venv/bin/python $(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

.venv-minimum/.installed: pyproject.toml constraints-minimum.txt
	@$(PYTHON) -m venv .venv-minimum
	@.venv-minimum/bin/python $(PIP) -c constraints-minimum.txt -e . pytest pytest-timeout pytest-xdist 'setuptools>=77'
	@touch $@
