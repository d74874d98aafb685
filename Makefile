# Everything runs from a fresh clone: each target makes the environment that it needs.
# PYTHON=python3.12 make install   chooses another interpreter (3.11 to 3.13).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
STAMP := .venv/.installed
LOOPBACK := .ci/loopback

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check format clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## Make .venv with clifflab, its extras for tests, and the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "clifflab needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,gguf]"
	@touch $@

quickstart: $(STAMP)  ## Measure and repair the refusal cliff of the shipped model: minutes on 2 cores
	$(LOOPBACK) $(BIN)/clifflab run jobs/quickstart.yaml --out runs

test: $(STAMP)  ## Run the tests, in two processes
	$(LOOPBACK) $(BIN)/python -m pytest -n 2

check: $(STAMP)  ## Lint, types (strict for the science ring), import rings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_rings.py

format: $(STAMP)  ## Put the code into its house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches; results in runs/ stay
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
