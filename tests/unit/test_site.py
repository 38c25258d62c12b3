"""The site has every page and every public name, and what is generated for it is up to date."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from versions import is_pinned

from website import command_line
from website.hooks import on_page_markdown
from website.tutorials import notebook, page_text, read_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
# What a user imports. Names of settings and choices that a recipe has are explained in the key table.
PUBLIC = ("diablo", "diablo.tuner", "diablo.ops", "diablo.data", "diablo.training", "diablo.merging")


def pages_in(navigation: Any) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_in(part)]


def documented() -> list[str]:
    pages = (DOCS / "reference").glob("*.md")
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(pages_in(SETTINGS["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_every_public_name_is_in_the_reference_once():
    names = documented()
    assert len(names) == len(set(names))
    shown = {name.rpartition(".")[2] for name in names}
    for room in PUBLIC:
        public = {name for name in import_module(room).__all__ if not name.startswith("_") and not name.isupper()}
        assert public <= shown, room


@pytest.mark.parametrize("name", documented())
def test_what_the_reference_shows_exists_and_has_a_docstring(name: str):
    room, _, own = name.rpartition(".")
    assert getattr(import_module(room), own).__doc__


def test_imports_of_the_reference_work():
    pages = (DOCS / "reference").glob("*.md")
    lines = [
        line for page in pages for line in re.findall(r"^from .+ import .+$", page.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(lines) > 8
    exec("\n".join(lines), {})


@pytest.mark.skipif(not is_pinned("typer"), reason="another version of typer writes the help in another way")
def test_the_page_of_the_command_line_is_what_the_help_says():
    said = command_line.PAGE.read_text(encoding="utf-8")
    assert said == command_line.page(), "run python -m website.command_line"


def test_the_figures_of_the_first_page_stand_in_the_readme():
    figures = re.findall(r"\d+\.\d+ %|\d[\d.,]*\d", (DOCS / "index.md").read_text("utf-8").partition("```")[0])
    assert len(figures) > 5
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [figure for figure in figures if figure not in readme] == []


@pytest.mark.parametrize(
    ("link", "url"),
    [
        ("../README.md#the-tree", "blob/main/README.md#the-tree"),
        ("../examples/sharded_training.py", "blob/main/examples/sharded_training.py"),
        ("../src/diablo", "tree/main/src/diablo"),
        ("results/quickstart.json", None),
        ("tuner.md#merging", None),
        ("../nowhere.md", None),
    ],
)
def test_a_link_out_of_the_documentation_leads_to_the_repository(link: str, url: str | None):
    config = SimpleNamespace(docs_dir=str(DOCS), config_file_path=str(ROOT / "mkdocs.yml"), repo_url="https://forge/us")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="recipes.md"))
    expected = link if url is None else f"https://forge/us/{url}"
    assert on_page_markdown(f"a [link]({link}).", page, config, None) == f"a [link]({expected})."


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_is_read_as_it_stands(page: Path):
    cells = read_page(page)
    assert page_text(cells) == page.read_text(encoding="utf-8")
    assert any(cell.output for cell in cells)


def test_an_output_that_nothing_printed_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```text\n4\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match="nothing that could have printed it"):
        read_page(page)


def test_a_tutorial_as_a_notebook_has_its_code_files_and_outputs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '# A page\n\n```python\nprint(2 + 2)\n```\n\n```text\n4\n```\n\n```yaml title="a.yaml"\nb: 1\n```\n\n'
        "```console\n$ ls\n$ cat a.yaml\n```\n",
        encoding="utf-8",
    )
    cells = json.loads(notebook(read_page(page)))["cells"]
    assert [cell["source"] for cell in cells] == [
        "# A page",
        "print(2 + 2)",
        "%%writefile a.yaml\nb: 1",
        "!ls\n!cat a.yaml",
    ]
    assert [output["text"] for cell in cells[1:] for output in cell["outputs"]] == ["4\n"]
