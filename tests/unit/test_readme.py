"""What the README and the pages say of tests and of each other leads somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=lambda page: page.name
)
MOST_CHARACTERS = 120
# A line that cannot be wrapped: a row of a table, a heading, or nothing but a link or an image.
UNWRAPPED = re.compile(r"\||#|([-*] |\d+\. )?!?\[[^\]]*\]\([^)]*\)[.,;:]?$")
# Cells of a feature table that claim nothing, and what cites the tests of those that do.
NO_CLAIM = ("no", "not yet")
CITED = re.compile(r"\((\d+(?:, \d+)*)\)")


@pytest.mark.parametrize(
    ("page", "section", "rooms", "least"),
    [
        ("README.md", "Next to PEFT's own methods", ("contract", "end_to_end"), 30),
        ("docs/other-trainers.md", "The tables", ("contract", "end_to_end", "unit"), 80),
    ],
)
def test_every_cell_of_the_feature_tables_is_backed_by_a_test(
    page: str, section: str, rooms: tuple[str, ...], least: int
) -> None:
    tables = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    named = dict(re.findall(r"^(\d+)\. `(test_\w+)`$", tables, re.MULTILINE))
    # Markdown counts by itself, whatever number stands there.
    assert list(named) == [str(number) for number in range(1, len(named) + 1)]
    claims = [line.split("|")[-2].strip() for line in tables.splitlines() if line.startswith("| ")]
    claims = [claim for claim in claims if claim != "DiaBlo"]
    assert len(claims) >= least
    for claim in claims:
        assert claim in NO_CLAIM or re.search(rf"{CITED.pattern}$", claim), claim
    assert {number for claim in claims for cited in CITED.findall(claim) for number in cited.split(", ")} == set(named)
    sources = "".join(path.read_text("utf-8") for room in rooms for path in (ROOT / "tests" / room).glob("test_*.py"))
    missing = [name for name in named.values() if f"def {name}(" not in sources]
    assert not missing


@PAGES
def test_links_of_the_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {link}"


def test_what_pypi_shows_of_the_readme_leads_into_the_repository_at_the_version() -> None:
    script = runpy.run_path(str(ROOT / "setup.py"))
    text = script["for_pypi"]((ROOT / "README.md").read_text(encoding="utf-8"), "https://forge/us", "v1.2")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    own = [link.removeprefix("https://forge/us/") for link in links if link.startswith("https://forge/us/")]
    assert len(own) > 20
    for link in own:
        kind, tag, path = link.split("/", 2)
        assert (kind, tag) == ("raw" if path.endswith(".png") else "blob", "v1.2")
        assert (ROOT / path.partition("#")[0]).is_file(), link
    assert [link for link in links if not link.startswith("https://")] == []


def test_every_test_that_a_page_names_exists() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    } | {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+)(?:\.py)?`", (ROOT / "docs" / "promises.md").read_text("utf-8"))
    assert len(named) > 15
    assert not set(named) - defined


def long_prose(text: str) -> list[str]:
    """The lines of prose that are too long. What stands between code fences is no prose."""
    prose = re.sub(r"^ *(```+).*?^ *\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in prose.splitlines() if len(line) > MOST_CHARACTERS and not UNWRAPPED.match(line.lstrip())]


@PAGES
def test_prose_is_wrapped(page: Path) -> None:
    assert long_prose(page.read_text(encoding="utf-8")) == []


def test_long_prose_is_told_from_what_cannot_be_wrapped():
    word = "x" * MOST_CHARACTERS
    kept = f"{word}\n| {word} |\n# {word}\n  - [{word}](page.md).\n![{word}](figure.png)\n```console\n$ {word}\n```\n"
    assert long_prose(kept) == []
    assert long_prose(f"{kept}{word}x\n- {word}\n[{word}](page.md) and more\n") == [
        f"{word}x",
        f"- {word}",
        f"[{word}](page.md) and more",
    ]
