"""What pyproject.toml says of the package is what the code needs and what is tested."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import diablo_cli
from diablo_cli import requirements

ROOT = Path(__file__).parents[2]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_command_line_asks_for_the_packages_of_its_extra():
    extra = {Requirement(line).name for line in project()["optional-dependencies"]["cli"]}
    assert extra == set(requirements.CLI_PACKAGES)


def test_a_command_that_lacks_packages_names_them_before_a_verb_is_read(monkeypatch, capsys):
    monkeypatch.setitem(requirements.CLI_PACKAGES, "trl", "trl_that_is_not_installed")
    monkeypatch.setattr(sys, "argv", ["diablo", "no-verb"])
    with pytest.raises(SystemExit, match="2"):
        diablo_cli.main()
    assert capsys.readouterr().err == (
        "error: the command line needs trl, which is not installed; install it with: pip install 'diablo-peft[cli]'\n"
    )


def test_the_version_is_told_with_those_of_the_libraries(diablo):
    status, out, _ = diablo("--version")
    assert status == 0
    assert out.startswith(f"diablo {sys.modules['diablo'].__version__}")
    assert {"python", "torch", "transformers", "peft", "trl", "accelerate"} <= set(out.split())
