"""The page of the command line, from what ``--help`` says; ``python -m website.command_line`` writes it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from diablo_cli.verbs import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "command-line.md"
WIDTH = 120
KINDS = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "path": "PATH", "list[Path]": "PATH"}
"""What an option takes, by how the name of its type begins."""
INTRO = """\
# The command line

This page lists every verb of `diablo` with its arguments and options. It says what `diablo VERB --help` says, and is
made from it. What the verbs are for, in the order in which they are used, is shown in
[the README](../../README.md#from-a-data-file-to-a-merged-model) and in [a tutorial](../tutorials/from-a-csv.md).

`diablo --install-completion` installs completion for bash, zsh and fish.
[Recipes](../recipes.md#in-an-editor-and-in-a-shell) says what it completes. With `--json` a verb prints one record for
scripts: [records](../recipes.md#records-for-scripts).
"""


def page() -> str:
    """The page, in Markdown."""
    return INTRO + "".join(_verb(f"diablo {name}", verb) for name, verb in _verbs(typer.main.get_command(app)))


def _verbs(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, f"{before}{name} ")
        elif not command.hidden:
            yield before + name, command


def _verb(name: str, verb: Any) -> str:
    context = verb.make_context(name, [], resilient_parsing=True)
    records = [(param, param.get_help_record(context)) for param in verb.params]
    shown = [(param, *record) for param, record in records if record is not None]
    arguments = [_argument(param) for param, *_ in shown if param.param_type_name == "argument"]
    usage = " ".join([name, *arguments, "[OPTIONS]"])
    paragraphs = [textwrap.fill(" ".join(part.split()), WIDTH) + "\n" for part in (verb.help or "").split("\n\n")]
    # A bar would end the cell.
    cells = [
        (_names(param, names).replace("|", "\\|"), _said(said).replace("|", "\\|")) for param, names, said in shown
    ]
    table = "\n".join(["| argument or option | |", "|---|---|", *(f"| {left} | {right} |" for left, right in cells)])
    return "\n".join([f"\n## {name}\n", *paragraphs, f"```console\n$ {usage}\n```\n", table, ""])


def _argument(param: Any) -> str:
    """An argument as it stands in a line of usage."""
    name = (param.metavar or param.name).upper()
    return name if param.required or name.startswith("[") else f"[{name}]"


def _names(param: Any, names: str) -> str:
    """An argument, or an option with what it takes."""
    if param.param_type_name == "argument":
        return f"`{_argument(param)}`"
    name, _, kind = names.partition(" <")
    if not kind:
        return " or ".join(f"`{name}`" for name in names.split(" / "))
    return f"`{name} {next(word for start, word in KINDS.items() if kind.startswith(start))}`"


def _said(text: str) -> str:
    """What the help says, with the default and the limits in brackets."""
    said, bracket, extra = " ".join(text.split()).partition(" [")
    if not bracket:
        return said
    return f"{said} ({extra.removesuffix(']').replace('x>=', 'at least ')})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
