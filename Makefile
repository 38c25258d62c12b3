# Two commands need nothing but Python 3.11 or newer and a network to PyPI: `make quickstart` and `make test`.
# Each makes its own .venv and installs the versions that constraints.txt pins.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all test-oldest fuzz lint schema wheel docs clean

quickstart: .venv/installed
	$(BIN)/diablo train quickstart

# A worker a core, each with one thread: files of tests run side by side, in the order of tests/conftest.py.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

# The oldest versions that pyproject.toml allows, in an environment of their own.
OLDEST := .venv-oldest/bin/python
OLDEST_EXTRAS := cli,embeddings,harness,quantized

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(OLDEST) -m pytest $(WORKERS) -m "not slow" tests/unit tests/numerical tests/contract \
		tests/end_to_end/test_command_line.py tests/end_to_end/test_format_versions.py

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --constraint constraints-oldest.txt --editable ".[$(OLDEST_EXTRAS)]" \
		hypothesis jsonschema pytest pytest-timeout pytest-xdist
	touch $@

# The sdist and the wheel, and what they do in a new environment outside of the repository.
wheel: .venv/installed
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/wheel/checks.py

# A minute for each reader of files of others; what is found lands in .venv/fuzz.
fuzz: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[fuzz]"
	for reader in recipe dataset adapter authors; do \
		HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz/readers.py $$reader .venv/fuzz/$$reader -max_total_time=60 \
			-artifact_prefix=.venv/fuzz/$$reader- || exit 1; done

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

# The schema of recipes, which is shipped as a file, after a change of their keys.
schema: .venv/installed
	$(BIN)/python -m diablo.recipes.schema

# torch goes first: a resolver that meets it later may have fetched another build by then.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cli,harness,quantized,gptq,deepspeed,liger,embeddings,serve,dev]"
	touch $@

# The site, into build/site; a link that leads nowhere is an error. Material announces MkDocs 2, which it does not take.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist
