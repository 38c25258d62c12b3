"""The long description of the package: README, with links that lead somewhere on PyPI too. All else is in pyproject."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def for_pypi(text: str, repository: str, tag: str) -> str:
    """README as PyPI shows it: its links, pictures and anchors are those of the repository at a tag.

    PyPI shows a page alone: it has no other files, and gives headings no anchors.
    """

    def absolute(found: re.Match[str]) -> str:
        before, link = found.groups()
        if re.match(r"\w+:", link):
            return found[0]
        kind = "raw" if link.endswith((".png", ".svg")) else "blob"
        return f"{before}({repository}/{kind}/{tag}/{'README.md' if link.startswith('#') else ''}{link})"

    return re.sub(r"(\])\(([^)\s]+)\)", absolute, text)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src/diablo/_version.py").read_text(encoding="utf-8"))
    assert version is not None
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=for_pypi(readme, project["urls"]["Repository"], f"v{version[1]}"),
        long_description_content_type="text/markdown",
    )
