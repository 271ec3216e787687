# Every target does its own set-up: nothing has to be run before it.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that really starts (a version manager may leave a name behind that does not).
PYTHON ?= $(shell for p in python3.11 python3; do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# One stamp per set of packages; a changed list installs again.
LISTS := pyproject.toml constraints.txt
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev

# Passed on, for example: make test PYTEST_ARGS='-k packing'; make quickstart ARGS=--controls
PYTEST_ARGS ?=
# Compiling, which is much of a test's time, keeps one core busy. The largest test takes half of 24 GiB.
TEST_PROCESSES ?= 2
PYTEST = $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=20
ARGS ?=

.PHONY: help setup quickstart test test-all bench bench-all lint format docs clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(DEV)  ## create .venv with everything a developer needs

quickstart: $(CORE)  ## the whole loop on the mini world, report in runs/quickstart
	$(BIN)/mis-jax quickstart $(ARGS)

test: lint  ## lint, then the tests that are not marked slow: every part, in minutes
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: test  ## and the slow ones: real sizes, the quickstart, processes killed, hosts, meshes
	$(PYTEST) -m slow $(PYTEST_ARGS)

bench: $(DEV)  ## a quick look at some benchmarks; conversion of a 1B-size checkpoint, every bit
	$(BIN)/python -m benchmarks all --smoke

bench-all: $(DEV)  ## the whole table of benchmarks/README.md, on a machine that does nothing else
	$(BIN)/python -m benchmarks all
	$(BIN)/python -m benchmarks table

lint: $(DEV)  ## import order of the folders, style, format, types
	$(BIN)/lint-imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(DEV)  ## put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DEV)  ## build the documentation into site/, any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what builds and checks leave behind (.venv and runs stay)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python found; install Python 3.11 or set PYTHON=" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d; set PYTHON=" % sys.version_info[:2] if not (3, 11) <= sys.version_info[:2] < (3, 14) else 0)'
	"$(PYTHON)" -m venv $(VENV)

$(CORE): $(LISTS) | $(BIN)/python
	$(PIP_INSTALL) -e .
	touch $@

# The development set holds the core.
$(DEV): $(LISTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	touch $(CORE) $@
