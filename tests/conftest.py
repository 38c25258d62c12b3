"""Unit, numerical and contract tests (PEFT's verbs over a table of models), and tests from end to end.

This file holds what several of them share.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The command line's console would keep the width that workers of the tests are given.
os.environ.pop("COLUMNS", None)

import jinja2
import typer.main
from launching import forked_python, has_gpu, interpret_triton_where_there_is_no_gpu, share_forks

import diablo_cli.verbs

# A process makes the command line once, and trains once: it reads what is installed, and compiles the template of model
# cards. The tests run it a thousand times in one.
typer.main.get_command = functools.cache(typer.main.get_command)
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)


def pytest_configure(config: pytest.Config) -> None:
    """Begin what takes a while, and have Triton interpret where there is no GPU."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        # This process hands the tests out, and its workers wait for it: it does not import torch.
        share_forks()
        if not has_gpu():
            # A fork could not use what has seen the GPU in the process that is forked.
            config.option.tx = [f"popen//python={forked_python()}" for _ in config.option.tx]
    else:
        # What a test starts by this is a process of its own, whatever the worker is.
        sys.executable = str(Path(sys.prefix, "bin", "python"))
        interpret_triton_where_there_is_no_gpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files from end to end take longest and have few tests: begun last, one would be waited for by all workers."""
    items.sort(key=lambda item: "end_to_end" not in item.path.parts)


@pytest.fixture(scope="module", autouse=True)
def what_stands_already_is_not_collected_again() -> None:
    """Collections of garbage leave out the objects of the libraries, a million: each run of a trainer asks for one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At the end all is collected: nanobind, which Triton uses, complains of what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with a tokenizer and a chat template; not to be written to."""
    from tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def diablo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process and gives its exit status, output and errors.

    The output is that for a terminal of 200 columns, or of the given ones.
    """

    def run(*args: object, columns: int = 200) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diablo", *map(str, args)])
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            diablo_cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
