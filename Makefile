# Needs make and Python 3.11 or newer; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint figures pictures docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: .venv/stamp ## compress the embedded digits network into build/, export it, and measure the exported file
	@mkdir -p build
	$(BIN)/rabbet compress --output build/digits.safetensors
	$(BIN)/rabbet export build/digits.safetensors --output build/digits.onnx
	$(BIN)/rabbet eval build/digits.onnx --test rabbet.demo:test

# One thread a worker: two workers on two cores would otherwise fight over them.
test: lint ## lint, then run the tests, with ALL=1 the slow ones, too; pytest's summary is the last line
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(if $(ALL),,-m "not slow")

lint: .venv/stamp ## ruff (rules and format), mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

figures: .venv/stamp ## make docs/figures.md and its pictures of the stored rows of the benchmarks
	$(BIN)/python benchmarks/figures.py

pictures: .venv/stamp ## take the pictures of reports in docs/pictures anew; needs Chromium
	RABBET_PICTURES=docs/pictures OMP_NUM_THREADS=1 $(BIN)/pytest tests/report/test_page.py -k pictures

docs: .venv/docs-stamp ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove all that make has made, .venv too
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Remade whenever the dependencies change; the stamp is written only once everything is installed.
.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "rabbet needs Python 3.11 or newer; found '$(PYTHON)': $$($(PYTHON) --version 2>&1)" >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The site's tools, beside the rest: only `make docs` needs them.
.venv/docs-stamp: .venv/stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@
