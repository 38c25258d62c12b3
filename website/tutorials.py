"""Tutorials: pages whose code runs from top to bottom, and whose outputs are what it printed.

A page is Markdown. A fence of ``python`` is code. A fence of ``console`` holds commands behind ``$``. A fence with a
``title`` is a file that the reader writes. A fence of ``text`` behind code or commands is what they printed.

``python -m website.tutorials PAGE --write`` runs a page in a new folder, and puts the outputs and pictures into it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

COLUMNS = 80
"""The width of the terminal that outputs are for."""
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)/]+)\)")


@dataclass(frozen=True)
class Cell:
    """A piece of a page.

    Attributes:
        language: ``python`` or ``console``; of a file its own, and of prose ``markdown``.
        code: what stands there.
        file: the name of the file that it is, or empty.
        output: what it printed, or empty.
    """

    language: str
    code: str
    file: str = ""
    output: str = ""

    @property
    def runs(self) -> bool:
        """Whether it is code or commands."""
        return self.language in ("python", "console") and not self.file


def read_page(page: Path) -> list[Cell]:
    """The cells of a page, prose among them."""
    cells: list[Cell] = []
    text, end = page.read_text(encoding="utf-8"), 0
    for fence in FENCE.finditer(text):
        if prose := text[end : fence.start()].strip("\n"):
            cells.append(Cell("markdown", prose))
        language, file, code = fence.groups()
        if language == "text":
            if prose or not cells or not cells[-1].runs:
                raise ValueError(f"{page}: an output stands behind nothing that could have printed it:\n{code}")
            cells[-1] = replace(cells[-1], output=code)
        else:
            cells.append(Cell(language, code, file or ""))
            if not file and not cells[-1].runs:
                raise ValueError(f"{page}: a fence of {language} needs a title:\n{code}")
        end = fence.end()
    if prose := text[end:].strip("\n"):
        cells.append(Cell("markdown", prose))
    return cells


def page_text(cells: Iterable[Cell]) -> str:
    """The page of these cells."""
    parts = []
    for cell in cells:
        if cell.language == "markdown":
            parts.append(cell.code + "\n")
            continue
        title = f' title="{cell.file}"' if cell.file else ""
        parts.append(f"```{cell.language}{title}\n{cell.code}```\n")
        if cell.output:
            parts.append(f"```text\n{cell.output}```\n")
    return "\n".join(parts)


def run(cells: Sequence[Cell]) -> list[Cell]:
    """Run cells one after the other in the current folder, and give them with what they printed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    done = []
    for cell in cells:
        printed = io.StringIO()
        if cell.file:
            Path(cell.file).write_text(cell.code, encoding="utf-8")
        elif cell.runs:
            with contextlib.redirect_stdout(printed):
                if cell.language == "python":
                    exec(compile(cell.code, "<tutorial>", "exec"), names)
                else:
                    for line in cell.code.splitlines():
                        _run_command(line.removeprefix("$ "))
        lines = printed.getvalue().strip("\n").splitlines()
        done.append(replace(cell, output="".join(line.rstrip() + "\n" for line in lines)))
    return done


def _run_command(command: str) -> None:
    """Run a line of a shell; ``diablo`` runs in this process, which need not import its libraries again."""
    words = shlex.split(command, comments=True)
    if words[0] != "diablo":
        print(subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE, text=True).stdout, end="")
        return
    import diablo_cli

    sys.argv = words
    try:
        diablo_cli.main()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{command} ended with status {ended.code}") from None


def changed(cells: Iterable[Cell], changes: Iterable[Sequence[str]]) -> list[Cell]:
    """Cells in which texts are replaced by others, such as a model by a smaller one.

    Raises:
        ValueError: no cell has one of the texts.
    """
    cells = list(cells)
    for old, new in changes:
        found = [replace(cell, code=cell.code.replace(old, new)) for cell in cells]
        if found == cells:
            raise ValueError(f"{old!r} stands nowhere in the page's code")
        cells = found
    return cells


def notebook(cells: Iterable[Cell]) -> str:
    """The cells as a Jupyter notebook with its outputs (format 4.5)."""
    made: list[dict[str, Any]] = []
    for number, cell in enumerate(cells):
        text = cell.code.rstrip("\n")
        shared: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if cell.language == "markdown":
            made.append({"cell_type": "markdown", **shared, "source": text})
            continue
        if cell.file:
            text = f"%%writefile {cell.file}\n{text}"
        elif cell.language == "console":
            text = re.sub(r"^\$ ", "!", text, flags=re.MULTILINE)
        shown = [{"output_type": "stream", "name": "stdout", "text": cell.output}] if cell.output else []
        made.append({"cell_type": "code", **shared, "source": text, "outputs": shown, "execution_count": None})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    record = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Run a page, and check or write what it prints."""
    parser = argparse.ArgumentParser(description="Run a tutorial in a new folder.")
    parser.add_argument("page", type=Path)
    parser.add_argument(
        "--write", action="store_true", help="put what it printed into the page, and pictures beside it"
    )
    parser.add_argument("--change", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="run other code")
    told = parser.parse_args()
    if told.write and told.change:
        parser.error("--write: a page shows what its own code printed; leave out --change.")
    page = told.page.resolve()
    cells = read_page(page)
    os.environ["COLUMNS"] = str(COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ran = run(changed([cell for cell in cells if cell.language != "markdown"], told.change))
        outputs = iter(ran)
        done = [cell if cell.language == "markdown" else replace(cell, output=next(outputs).output) for cell in cells]
        pictures = [name for cell in cells if cell.language == "markdown" for name in PICTURE.findall(cell.code)]
        for name in pictures:
            if not Path(name).is_file():
                raise RuntimeError(f"{page.name} shows {name}, which its code does not draw")
        if told.write:
            page.write_text(page_text(done), encoding="utf-8")
            for name in pictures:
                shutil.copy(name, page.parent / name)
        os.chdir(page.parent)
    for cell, now in zip(cells, done, strict=True):
        if cell.output and not now.output:
            raise RuntimeError(f"{page.name} shows {cell.output!r}, and this printed nothing:\n{cell.code}")


if __name__ == "__main__":
    main()
