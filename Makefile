# The verbs of the project; each sets up what it needs. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEEDS ?= 5
WORKERS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-slow recipes examples docs bench clean

help:  ## List the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.core: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "potstill needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip install --quiet --progress-bar off -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.core
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[dev]'
	@touch $@

setup: $(VENV)/.dev  ## Make the virtual environment with everything that the tests need

demo: $(VENV)/.core  ## Distil the bundled digits with 5 seeds and show teacher, baseline and student
	$(BIN)/potstill distill digits --seeds $(SEEDS) --output runs/demo

check: setup  ## Lint, types, import rule and sizes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_structure.py

test: setup  ## The test suite, with coverage, in WORKERS processes
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS) --dist loadscope --cov --cov-report=term:skip-covered --cov-fail-under=85 --durations=15

test-slow: setup  ## The long tests too
	$(BIN)/python -m pytest -m 'slow'

recipes: setup  ## Dry-run every packaged recipe
	$(BIN)/python -m pytest tests/recipes

examples: setup  ## Run every example
	$(BIN)/python -m pytest tests/test_examples.py

docs: $(VENV)/.core  ## Build the documentation, warnings as errors
	$(BIN)/python -m pip install --quiet --progress-bar off -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: setup  ## Measure the figures of the README and of the notes
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/trainer_overhead.py
	$(BIN)/python benchmarks/gradients.py
	$(BIN)/python benchmarks/contract_mutations.py
	$(BIN)/python benchmarks/planted_faults.py
	$(BIN)/python benchmarks/kill_resume.py
	$(BIN)/potstill distill digits --seeds 5 --quiet
	$(BIN)/potstill distill synthetic-tabular --seeds 10 --quiet

clean:  ## Delete what the verbs made
	rm -rf $(VENV) build dist site .coverage* .pytest_cache .mypy_cache .ruff_cache
