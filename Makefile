# Two commands for a fresh machine:  make quickstart   and   make test
PYTHON ?= python3
VENV ?= .venv
# The torch build to install; CI and laptops take this one, GPU machines name theirs: make install TORCH='torch==2.11.0'
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2

.PHONY: help install develop quickstart test test-fast lint format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## Create .venv with the project and its pinned dependencies
develop: $(VENV)/.developing  ## The same with trackers, data preparation, test tools and linters

# Bytecode is made when a module is first used: compiling all of it doubles the installation (2:00 for 1:02).
# Without build isolation, so that the C++ ops are built against the torch that will load them.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt '$(TORCH)' setuptools wheel
	$(PIP) install -q --no-compile -c constraints.txt --no-build-isolation -e '.[train]'
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(PIP) install -q --no-compile -c constraints.txt --no-build-isolation -e '.[train,trackers,prep,eval,dev]'
	@touch $@

quickstart: install  ## Sample corpus, tokenizer, two minutes of training, summary and plot
	$(BIN)/headrace data sample --out data/sample
	$(BIN)/headrace tokenizer train --data data/sample --vocab-size 1024 --out data/tokenizer
	$(BIN)/headrace train recipes/quickstart.yaml
	$(BIN)/headrace report runs/quickstart

test: develop  ## Everything that can be tested without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

test-fast: develop  ## The tests that take less than ten seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m 'not slow'

lint: develop  ## Format, style, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	! grep -rnIE '^(<{7}|>{7}) ' --include='*.py' --include='*.md' --include='*.yaml' --exclude-dir=.venv .

format: develop  ## Rewrite files the way `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove what `make` made, but no run folder
	rm -rf $(VENV) data build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
