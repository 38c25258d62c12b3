"""The house: its rooms from the lowest to the highest, what they import, and README's table of them.

``python tests/house.py`` writes the table into README.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"

# A room imports those before it. What stands here is a package or a file of the package diablo, or another package.
ROOMS = (
    "diablo/errors.py",
    "diablo/importing.py",
    "diablo/devices.py",
    "diablo/layout.py",
    "diablo/records",
    "diablo/muon.py",
    "diablo/ops",
    "diablo/tuner",
    "diablo/execution",
    "diablo/data",
    "diablo/models",
    "diablo/tasks",
    "diablo/scoring",
    "diablo/recipes",
    "diablo/planning",
    "diablo/quantization",
    "diablo/merging",
    "diablo/publishing",
    "diablo/training",
    "diablo/comparison",
    "diablo/serving",
    "diablo/web",
    "diablo_cli",
)
BESIDE = {
    "benchmarks": "__init__.py",
    "experiments": "__init__.py",
    "website": "__init__.py",
    "tests": "conftest.py",
}
# They hand names on: whoever imports diablo has the tuner, and ``python -m`` the command line.
FACES = ("diablo/__init__.py", "diablo/__main__.py", "diablo/_version.py")


def files() -> dict[str, Path]:
    """The files of the package by their dotted names."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        parts = path.relative_to(SOURCES).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """The files of the package that a file imports, anywhere in it, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known.keys()


def room_of(path: Path) -> str:
    """The room that a file is in: one of ROOMS or of FACES."""
    name = path.relative_to(SOURCES).as_posix()
    return next(room for room in (*ROOMS, *FACES) if name == room or name.startswith(f"{room}/"))


def tree() -> str:
    """README's table: every room and the first sentence of what its docstring says."""
    rows = [(f"src/{room}", "__init__.py") for room in ROOMS] + list(BESIDE.items())
    lines = ["| room | what is in it |", "|---|---|"]
    for name, face in rows:
        place = ROOT / name
        path = place / face if place.is_dir() else place
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
        lines.append(f"| `{name}{'/' if place.is_dir() else ''}` | {' '.join(summary.split()).removesuffix('.')} |")
    return "\n".join(lines) + "\n"


def readme_with_tree() -> str:
    """README as it is with the table in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, title, after = text.partition("## The tree\n\n")
    _, following, rest = after.partition("\n## ")
    return before + title + tree() + following + rest


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_with_tree(), encoding="utf-8")
