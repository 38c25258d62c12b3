"""What pyproject.toml says of the package is what the code needs and what is tested."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import diablo_cli
from diablo import __version__
from diablo_cli import requirements

ROOT = Path(__file__).parents[2]
EXTRAS_OF_OLDEST = ("cli", "embeddings", "harness", "images", "quantized")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_command_line_asks_for_the_packages_of_its_extra():
    extra = {Requirement(line).name for line in project()["optional-dependencies"]["cli"]}
    assert extra == set(requirements.CLI_PACKAGES)


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def test_the_oldest_versions_are_tested_and_the_newest_are_allowed():
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    extras = project()["optional-dependencies"]
    tested = [*project()["dependencies"], *(line for name in EXTRAS_OF_OLDEST for line in extras[name])]
    for requirement in map(Requirement, tested):
        package = canonicalize_name(requirement.name)
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert Version(oldest[package]) == Version(bound.version), f"{requirement} is not what is tested"
        assert requirement.specifier.contains(newest[package])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"VERSIONS_EXTRAS := {','.join(EXTRAS_OF_OLDEST)}\n" in makefile


def test_the_page_of_versions_has_what_is_tested():
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([A-Za-z]+).*? (\| [\d.]+ \| [\d.]+) \|$", page, re.MULTILINE))
    oldest, newest = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    for package in ("torch", "transformers", "PEFT", "accelerate", "TRL"):
        name = package.lower()
        assert rows[package] == f"| {oldest[name]} | {newest[name]}"
    assert rows["Python"].startswith(f"| {project()['requires-python'].removeprefix('>=')} |")


def test_what_the_inner_loop_leaves_out_is_a_test_of_its_files():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (names,) = re.findall(r"^FAST := (.*)$", makefile, re.MULTILINE)
    files = [path for path in (ROOT / "tests").glob("*/test_*.py") if path.stem.removeprefix("test_") in names]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    (left_out,) = re.findall(r"^LENGTHY := (.*)$", makefile, re.MULTILINE)
    for name in re.split(r"\s+or\s+", left_out):
        assert f"def {name}(" in text


def test_the_citation_is_of_this_version_and_prefers_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == __version__
    assert cited["repository-code"] == project()["urls"]["Repository"]
    assert {each["value"] for each in cited["preferred-citation"]["identifiers"]} == {"arXiv:2506.03230"}
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_the_forms_of_issues_have_what_a_forge_asks_for():
    forms = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"]
        assert form["description"]
        ids = [part["id"] for part in form["body"]]
        assert len(set(ids)) == len(ids)
        assert all(part["attributes"]["label"] for part in form["body"])


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
    assert out.startswith(f"diablo {__version__}")
    assert {"python", "torch", "transformers", "peft", "trl", "accelerate"} <= set(out.split())
