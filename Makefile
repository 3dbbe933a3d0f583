# The menu of this house. `make` alone prints it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
.DEFAULT_GOAL := help
.PHONY: help demo check test test-flux lint format bench soak clean

help: ## Show this menu
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "restyle needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version`. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need (once)"
	@$(PIP) install -e '.[test]'
	@touch $@

$(VENV)/.installed-flux: $(VENV)/.installed-test
	@echo "installing what the flux engine needs (once)"
	@$(PIP) install torch==2.13.0
	@$(PIP) install -e '.[test,flux]'
	@touch $@

demo: $(VENV)/.installed ## Restyle a dozen images on this machine: no key, no cost, no model
	@$(BIN)/restyle run manifests/demo.csv -o out/demo -c configs/demo.toml

check: lint ## A minute's check: lint, and the tests of units, runner and journal without the slow ones
	@SOAK_EXAMPLES=10 $(BIN)/python -m pytest -q -n auto -m 'not slow' tests/unit tests/runner tests/contract

test: $(VENV)/.installed-test ## Run all tests but those of the flux engine (sets itself up)
	@$(BIN)/python -m pytest -q -n auto --ignore=tests/flux

test-flux: $(VENV)/.installed-flux ## Run the tests of the flux engine, with a tiny model on the CPU (installs torch)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/flux --ignore=tests/flux/test_tuning.py
	@# Apart: once something was compiled, a whole process rounds a little differently.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/flux/test_tuning.py

lint: $(VENV)/.installed-test ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.installed-test ## Let ruff put the code in order
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-test ## Measure; writes docs/benchmarks.md
	@$(BIN)/python -m tests.benchmarks

soak: $(VENV)/.installed-test ## Kill and break it for hours; goes on where it stopped (docs/faults.md)
	@$(BIN)/python -m tests.faults.soak
	@SOAK_EXAMPLES=20000 $(BIN)/python -m pytest -q tests/runner/test_model.py

clean: ## Remove what the targets above made
	rm -rf $(VENV) out .mypy_cache .ruff_cache .pytest_cache .hypothesis
