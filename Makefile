# Two commands: `make demo` (the whole loop) and `make test`. Both build .venv when it is missing or stale.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(if $(shell $(p) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] < (3,13))' 2>/dev/null && echo ok),$(p))))
VENV := .venv
BIN := $(VENV)/bin
# The environment carries the folder to Python, because neither the shell nor Make takes every folder name unharmed.
RUNS ?= runs
export RUNS
# Processes that share the tests, whole files each; every one that needs Ray has a cluster of its own.
WORKERS ?= 2
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-long golden lint native ui clean help

help:
	@echo "make demo   train, sweep, evaluate, promote, deploy and ask, on this machine"
	@echo "make test   linters and tests"
	@echo "make native compile the native CPU operators (done by demo and test too)"
	@echo "make golden rewrite the golden losses of training"
	@echo "make ui     the MLflow UI of runs/ (or RUNS=folder) on http://127.0.0.1:5000"

# The stamp holds the time of the last complete install: an interrupted one leaves none, so make repeats it.
$(VENV)/.installed: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "error: no Python 3.11 or 3.12 on PATH; install one or pass PYTHON=/path/to/python" >&2; exit 1; fi
	@rm -f $@
	@echo "installing Python packages into $(VENV); this takes a few minutes and prints little until it ends"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -e '.[dev]'
	@touch $@

# Without a compiler this says so in one line, and the stamp is set all the same: `make native` tries again.
$(VENV)/.native: $(VENV)/.installed $(wildcard kernels/*/*.cpp kernels/native/*.cpp kernels/native/*.h kernels/native/*.py)
	$(BIN)/python -m kernels.native.build
	touch $@

.venv: $(VENV)/.native

native: $(VENV)/.installed
	$(BIN)/python -m kernels.native.build

demo: .venv
	$(BIN)/python -m pipelines demo --config configs/tiny.yaml $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: .venv
	$(BIN)/python -m pytest -m long $(ARGS)

golden: .venv
	$(BIN)/python -m tests.pipelines.test_golden

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: .venv
	@$(BIN)/python -m pipelines.tracking.ui

clean:
	rm -rf $(VENV) build *.egg-info
