# Two commands need nothing but Python 3.11 or newer and a network to PyPI: `make quickstart` and `make test`.
# Each makes its own .venv and installs the versions that constraints.txt pins.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-fast test-all test-oldest test-3.12 test-3.13 fuzz lint schema wheel docs clean

quickstart: .venv/installed
	$(BIN)/diablo train quickstart

# A worker a core, each with one thread: files of tests run side by side, in the order of tests/conftest.py.
WORKERS := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

# The inner loop, of a minute: geometry, layers, passes, merging, rows, recipes and what the command line refuses.
FAST := $(addprefix tests/unit/test_,$(addsuffix .py,adapters config encoding formats layout losses merging_shards \
	methods muon new_tokens packing preflight recipe rows)) tests/numerical/test_ops.py \
	$(addprefix tests/contract/test_,$(addsuffix .py,injection passes preview several_adapters))
LENGTHY := test_the_memory_of_a_file_is_enough or test_a_full_disk_is_a_clear_error_and_leaves_nothing_behind \
	or test_a_run_with_muon_that_was_resumed_ends_with_the_same_adapter_to_the_bit

test-fast: .venv/installed
	$(PYTEST) -m "not slow" -k "not ($(LENGTHY))" $(FAST)

# What is run with other versions than those of .venv, each in an environment of its own.
VERSIONS_TESTED := tests/unit tests/numerical tests/contract \
	tests/end_to_end/test_command_line.py tests/end_to_end/test_format_versions.py
VERSIONS_EXTRAS := cli,embeddings,harness,images,quantized
VERSIONS_TOOLS := hypothesis jsonschema openai pytest pytest-timeout pytest-xdist

# The oldest versions that pyproject.toml allows.
test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(WORKERS) -m "not slow" $(VERSIONS_TESTED)

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt \
		--editable ".[$(VERSIONS_EXTRAS)]" $(VERSIONS_TOOLS)
	touch $@

# The pinned versions under another Python, python3.12 or python3.13, which must be on the PATH.
OTHER_PYTHONS := test-3.12 test-3.13
$(OTHER_PYTHONS): test-%: .venv-%/installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(WORKERS) -m "not slow" $(VERSIONS_TESTED)

.venv-3.%/installed: pyproject.toml constraints.txt
	python3.$* -m venv .venv-3.$*
	.venv-3.$*/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable ".[$(VERSIONS_EXTRAS),serve]" $(VERSIONS_TOOLS)
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
	$(BIN)/pyrefly check

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
	rm -rf .venv .venv-* build dist
