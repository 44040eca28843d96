# Two commands: `make run` shows the whole idea on a real model, `make test` runs every check.
# Each does all of its own set-up in .venv and may be repeated at will.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2

# One BLAS thread: two that share a busy core wait for each other and run ten times slower. Override on a quiet machine.
export OPENBLAS_NUM_THREADS ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: run test lint slow wheel gpu-check clean
.DELETE_ON_ERROR:

run: $(VENV)/.run-ready
	@$(BIN)/python examples/tour.py

test: lint
	@$(BIN)/ferrum-ref pull smollm2-135m
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m "not slow"

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_clauses.py

slow: $(VENV)/.test-ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q -m slow

# On a machine with an NVIDIA GPU, with whatever Python has torch, cupy or numba-cuda there: PYTHON=python3
gpu-check:
	PYTHONPATH=.:backends:simulator $(PYTHON) tools/gpu_check.py

wheel: $(VENV)/.test-ready
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ferrum-ref needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "Set-up: a private Python environment in $(VENV) (the first time takes a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet -c constraints.txt pip hatchling editables
	@touch $@

$(VENV)/.run-ready: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Set-up: installing numpy, tokenizers, torch (CPU) and simpy at pinned versions"
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[all]'
	@touch $@

$(VENV)/.test-ready: $(VENV)/.run-ready
	@echo "Set-up: installing the checkers at pinned versions"
	@$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[all,test]'
	@touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
