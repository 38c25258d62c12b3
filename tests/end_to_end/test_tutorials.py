"""The tutorials run from top to bottom, with a tiny model and few rows, and print where their pages say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import ROOT, run_python

BUILTIN = "builtin:smollm2-135m"
# What a page's code is changed to besides its model: it must still be what the page teaches.
SMALLER = {
    "trainer": {"ROWS = 128": "ROWS = 16", "[:64]": "[:8]", "num_blocks=16": "num_blocks=4"},
    "from-a-csv": {"ROWS = 192": "ROWS = 40", "num_blocks: 16": "num_blocks: 4"},
    "four-bits": {
        "limit: 192": "limit: 24",
        "evaluation: {limit: 32}": "evaluation: {limit: 4}",
        "num_blocks: 16": "num_blocks: 4",
    },
    "what-an-adapter-did": {"limit: 96": "limit: 32", "num_blocks: 16": "num_blocks: 4"},
    "fair-comparison": {
        "limit: 128": "limit: 24",
        "validation_rows: 32": "validation_rows: 8",
        "num_blocks: 16": "num_blocks: 4",
        "--seeds 2": "--seeds 1",
        "--lrs 1e-3,3e-3": "--lrs 0.1,0.3",  # so small a model learns at these, and the grid need not grow
    },
}


@pytest.mark.parametrize(
    "page",
    [
        "trainer",
        "from-a-csv",
        "four-bits",
        "what-an-adapter-did",
        pytest.param("fair-comparison", marks=pytest.mark.slow),  # each of its runs is a process of its own
    ],
)
def test_a_tutorial_runs_from_top_to_bottom(page: str, tiny_model: Path) -> None:
    changes = {BUILTIN: str(tiny_model), **SMALLER[page]}
    told = [part for change in changes.items() for part in ("--change", *change)]
    ended = run_python("-m", "website.tutorials", ROOT / "docs" / "tutorials" / f"{page}.md", *told)
    assert ended.returncode == 0, ended.stderr
    assert set(SMALLER) == {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")}
