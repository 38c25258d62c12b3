"""The README's claims that name a test name one that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_cell_of_the_feature_table_is_backed_by_a_test():
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("## Next to PEFT's own methods")[2].partition("\n## ")[0]
    named = dict(re.findall(r"^(\d+)\. `(test_\w+)`$", table, re.MULTILINE))
    cited = set(re.findall(r"\((\d+)\) \|$", table, re.MULTILINE))
    assert cited == named.keys() != set()
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "contract").glob("test_*.py"))
    missing = [name for name in named.values() if f"def {name}(" not in sources]
    assert not missing
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        claim = row.split("|")[-2].strip()
        assert claim in ("no", "not yet") or re.search(r"\(\d+\)$", claim), row
