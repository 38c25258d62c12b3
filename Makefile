# Two commands need nothing but Python 3.11 or newer and a network to PyPI: `make quickstart` and `make test`.
# Each makes its own .venv and installs the versions that constraints.txt pins.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all lint clean

quickstart: .venv/installed
	$(BIN)/diablo train quickstart

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first: a resolver that meets it later may have fetched another build by then.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,dev]"
	touch $@

clean:
	rm -rf .venv
