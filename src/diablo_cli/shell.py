"""What the verbs share: the application, and what they refuse."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diablo_cli.output import App

app = App(
    help="Fine-tune language models by their diagonal blocks: from a data file to a merged model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_versions(asked: bool) -> None:
    if not asked:
        return
    import platform

    from diablo.records.results import describe_versions

    versions = describe_versions()
    own, commit = versions.pop("diablo"), versions.pop("commit")
    others = [f"{name} {version or 'not installed'}" for name, version in versions.items()]
    print(f"diablo {own}{f' at commit {commit}' if commit else ''}")
    print(", ".join([f"python {platform.python_version()}", *others]))
    raise typer.Exit


@app.callback()
def _options_of_diablo(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the versions, for a report.", is_eager=True, callback=_print_versions),
    ] = False,
) -> None:
    pass


Base = Annotated[str | None, typer.Option(help="Base model to use in place of the one that the adapter names.")]


def refuse(reason: str, options: dict[str, Any]) -> None:
    """Refuse options that would have no effect."""
    from diablo.errors import UserError

    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{', '.join(given)}: {reason}; leave out the one or the other.")


def check_file(path: Path | None, option: str = "--out") -> None:
    """Check that a file can be written, before what it is to hold is worked out."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        from diablo.errors import UserError

        raise UserError(f"{option}: {str(path)!r} cannot be written; give a file in a folder that exists.")


def check_new_rows(path: Path, overwrite: bool) -> None:
    """Check that a file of rows can be written, and that the file is new unless it may be overwritten."""
    from diablo.errors import UserError

    check_file(path, "OUT")
    if path.suffix != ".jsonl":
        raise UserError(f"OUT: found {str(path)!r}; rows are written as lines of JSON: give a name in .jsonl.")
    if path.exists() and not overwrite:
        raise UserError(f"OUT: {str(path)!r} is there already; give another name, or --overwrite.")


def is_recipe(name: str) -> bool:
    """Whether a name stands for a recipe: a YAML file, or one that diablo ships."""
    from diablo.recipes.reading import shipped_recipes

    return not Path(name).is_dir() and (name in shipped_recipes() or name.endswith((".yaml", ".yml")))


def check_model(name: str | None, option: str = "model") -> None:
    """Check that a name can be a model's, before anything heavy is imported or a hub is asked.

    Args:
        name: what the user gave; None for nothing.
        option: where, for the message.
    """
    from diablo.errors import UserError, did_you_mean
    from diablo.models.names import WHAT_TO_GIVE, check_name
    from diablo.recipes.reading import shipped_recipes

    if name is None or Path(name).is_dir():
        return
    recipes = shipped_recipes()
    if name in recipes:
        raise UserError(
            f"{option}: {name!r} is a recipe, not a model; give the folder that diablo train {name} wrote, or a model."
        )
    # Ids on the hub without a slash are few and old: what is almost the name of a recipe is none of them.
    if "/" not in name and (meant := did_you_mean(name, recipes)):
        raise UserError(f"{option}: there is no folder {name!r}. {WHAT_TO_GIVE}{meant}")
    check_name(name, option)


def check_writes(name: str, verb: str) -> None:
    """Check that a model, an adapter or a run writes text, where a verb has no use for one that labels texts."""
    from diablo.models.heads import check_writes as check

    check(name, verb)


def read_texts(texts: list[str] | None, file: Path | None) -> list[Any]:
    """What a verb asks about: texts, or the objects that stand for more than a text; one or more.

    Args:
        texts: those of the command line.
        file: a dataset, or a ``.txt`` of lines; standard input where there are neither texts nor a file.

    Raises:
        UserError: there is none, or the file cannot be read.
    """
    from diablo.errors import UserError

    if texts and file is not None:
        raise UserError("--file: found a file beside texts; give the one or the other.")
    if file is not None and not file.is_file():
        raise UserError(f"--file: there is no file {str(file)!r}.")
    given = _records(texts, file)
    if not given:
        raise UserError("TEXT: found none; give texts, --file, or lines on standard input.")
    return given


def _records(texts: list[str] | None, file: Path | None) -> list[Any]:
    if file is None or file.suffix == ".txt":
        if texts:
            return [_object(text) for text in texts]
        lines = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
        return [_object(line) for line in lines.splitlines() if line.strip()]
    from diablo.data.faults import RowFault
    from diablo.data.reading.files import read_records_of
    from diablo.errors import UserError

    records = read_records_of(file)
    if faults := [record for _, record in records if isinstance(record, RowFault)]:
        raise UserError(f"--file: {faults[0]}")
    return [record for _, record in records]


def _object(line: str) -> Any:
    """A line as it is, or the JSON object that it is."""
    text = line.strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def quiet() -> None:
    """Keep the libraries' own bars and advice off the terminal; what matters is reported by diablo.

    Nothing is imported for that: each library is told when it is.
    """
    import warnings

    from diablo.importing import when_imported

    # What they advise about their own settings, which a recipe's user does not have.
    for library in ("peft", "transformers", "trl", "accelerate", "datasets", "huggingface_hub", "torch", "torchao"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    warnings.filterwarnings("ignore", category=FutureWarning)
    when_imported("huggingface_hub", _quiet_hub)
    when_imported("transformers", _quiet_transformers)
    # Its import alone prints an empty line. It comes with gptqmodel, for which transformers is imported first.
    when_imported("transformers", _quiet_logbar)


def _quiet_hub() -> None:
    import huggingface_hub.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _quiet_logbar() -> None:
    # gptqmodel's log opens with an empty line, and then has a banner.
    with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")
