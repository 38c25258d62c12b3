"""What the verbs share: the application, and what they refuse."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from diablo_cli.output import App

app = App(
    help="Fine-tune language models by their diagonal blocks: from a data file to a merged model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

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
