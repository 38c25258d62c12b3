"""Verbs about recipes themselves: give editors their schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from diablo_cli.completion import schema_text
from diablo_cli.shell import app, check_file, out


@app.command()
def schema(
    out_file: Annotated[Path | None, typer.Option("--out", help="A file to write it to.")] = None,
) -> None:
    """Print the JSON schema of a recipe, by which editors complete and check one."""
    check_file(out_file)
    if out_file is None:
        print(schema_text(), end="")
        return
    out_file.write_text(schema_text(), encoding="utf-8")
    out.print(f"Wrote {escape(str(out_file))}. The first line of a recipe beside it:")
    out.print(f"# yaml-language-server: $schema={out_file.name}", markup=False)
