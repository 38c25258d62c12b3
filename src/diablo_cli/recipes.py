"""Verbs about recipes themselves: write one to begin with, and give editors their schema."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from diablo_cli.completion import allowed, complete_trained_tasks, schema_text
from diablo_cli.output import answer, out, progress
from diablo_cli.shell import app, check_file, refuse

_MODEL, _TASK, _BLOCKS = "builtin:smollm2-135m", "mawps", 64


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help=f"A folder, a hub id or builtin:NAME; {_MODEL} by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="A file of rows to train on.")] = None,
    eval_file: Annotated[
        Path | None, typer.Option("--eval", help="A file of held-out rows; a tenth of many rows by default.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Names of tasks to train on in place of --data, separated by commas.",
            autocompletion=complete_trained_tasks,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder that the run will write to; runs/NAME of the rows by default.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help=f"N: 1/N of each target matrix is trained; {_BLOCKS} by default.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help=f"Ask nothing; without --data, train on {_TASK}.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a recipe to begin with; on a terminal, what is not given is asked for."""
    _check_target(file, force=force)
    if task is not None:
        refuse("a task brings its own rows", {"--data": data, "--eval": eval_file})
    ask = _ask if sys.stdin.isatty() and not yes else _take_default
    if data is None and task is None and ask is _take_default and not yes:
        from diablo.errors import UserError

        raise UserError(f"--data: missing; give --data FILE or --task NAME, or --yes to train on {_TASK}.")
    model = model or ask("Model (a folder, a hub id or builtin:NAME)", _MODEL)
    if data is None and task is None:
        rows = ask("Rows to train on (a file, or the name of a task)", _TASK, _known_rows)
        task, data = (rows, None) if _are_tasks(rows) else (None, Path(rows))
    name = data.name.strip(".").partition(".")[0] if data is not None else str(task).replace(",", "-")
    output = output or Path(ask("Folder that the run will write to", f"runs/{name}"))
    num_blocks = num_blocks or ask("N (1/N of each target matrix is trained)", _BLOCKS, _positive)

    import yaml

    from diablo.data.faults import explain_faults
    from diablo.recipes.starter import starter_recipe

    settings: dict[str, Any] = {"model": model, "output": output, "method": {"num_blocks": num_blocks}}
    if task is not None:
        settings["task"] = task.split(",")
    settings["data"] = {"train": data, "eval": eval_file}
    text, faults = starter_recipe(settings)
    for path, of_file in faults.items():
        if of_file:
            progress.print(
                f"{path} has {len(of_file)} malformed rows. {explain_faults(of_file)} Mend them, or set "
                "data.on_malformed to skip.",
                markup=False,
            )
    file.write_text(text, encoding="utf-8")
    out.print(
        f"Wrote {escape(str(file))}: N = {num_blocks} on {escape(model)}, trained on {escape(str(task or data))}."
    )
    out.print(f"Next: diablo train {escape(shlex.quote(str(file)))} --dry-run")
    malformed = {path: len(of_file) for path, of_file in faults.items()}
    answer({"file": file, "recipe": yaml.safe_load(text), "malformed_rows": malformed})


@app.command()
def schema(
    out_file: Annotated[Path | None, typer.Option("--out", help="A file to write it to.")] = None,
) -> None:
    """Print the JSON schema of a recipe, by which editors complete and check one."""
    check_file(out_file)
    if out_file is None:
        out.out(schema_text(), end="", highlight=False)
        answer(json.loads(schema_text()))
        return
    out_file.write_text(schema_text(), encoding="utf-8")
    out.print(f"Wrote {escape(str(out_file))}. The first line of a recipe beside it:")
    out.print(f"# yaml-language-server: $schema={out_file.name}", markup=False)
    answer({"file": out_file})


def _check_target(file: Path, *, force: bool) -> None:
    """Check that the recipe can be written, before anything is asked."""
    check_file(file, "FILE")
    reason = ""
    if file.suffix not in (".yaml", ".yml"):
        reason = "is not the name of a YAML file; let it end in .yaml"
    elif file.exists() and not force:
        reason = "is there already; give another name, or --force to overwrite it"
    if reason:
        from diablo.errors import UserError

        raise UserError(f"FILE: {str(file)!r} {reason}.")


def _ask(question: str, default: Any, check: Callable[[str], Any] = str) -> Any:
    """What the user answers; Enter takes the default. Questions go to where progress goes, beside the output."""
    return typer.prompt(question, default=default, value_proc=check, err=True)


def _take_default(question: str, default: Any, check: Callable[[str], Any] = str) -> Any:
    return default


def _are_tasks(rows: str) -> bool:
    return set(rows.split(",")) <= set(allowed("task"))


def _known_rows(answer: str) -> str:
    if _are_tasks(answer) or Path(answer).is_file():
        return answer
    raise typer.BadParameter(
        f"there is no file {answer!r}, nor a task to train on; tasks: {', '.join(allowed('task'))}."
    )


def _positive(answer: str | int) -> int:
    # What is typed is a str; the default is an int.
    if str(answer).isdecimal() and int(answer) > 0:
        return int(answer)
    raise typer.BadParameter(f"found {answer!r}; give an integer of at least 1.")
