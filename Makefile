# Each target makes what it needs: a virtual environment in .venv with the versions of
# constraints.txt. Packages are installed again only when pyproject.toml or constraints.txt changed.

# The first of these that is new enough, unless named: make test PYTHON=python3.12
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/installed-demo
DEV := $(VENV)/installed-dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint format check benchmark clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO) ## Run a guarded conversation with the bundled models
	@echo "==> Running the demo"
	@$(BIN)/langchain-stars demo

test: $(DEV) ## Run the tests; choose some with ARGS="-k decoder"
	@echo "==> Running the tests"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(DEV) ## Check format, lint rules, types and import layers
	@echo "==> Checking the format"
	@$(BIN)/ruff format --check .
	@echo "==> Checking the lint rules"
	@$(BIN)/ruff check .
	@echo "==> Checking the types"
	@$(BIN)/mypy
	@echo "==> Checking the import layers"
	@$(BIN)/lint-imports

format: $(DEV) ## Format the code, and repair what the lint rules can repair
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

check: lint test ## Everything that is checked before a commit

benchmark: $(DEV) ## Measure guarded decoding beside the plain decoder
	@echo "==> Running the benchmark"
	@$(BIN)/python examples/benchmark.py $(ARGS)

clean: ## Remove the virtual environment and everything made
	rm -rf $(VENV) build dist .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(PYTHON),false) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
		echo "langchain_stars needs Python 3.11 or newer$(if $(PYTHON), and $(PYTHON) is not)." >&2; \
		echo "Name one: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> Creating $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing torch and transformers (the first time, some minutes)"
	@$(BIN)/python -m pip install -c constraints.txt torch transformers
	@echo "==> Installing langchain_stars"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cli]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing langchain_stars and the tools to develop it (the first time, some minutes)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(DEMO) $@
