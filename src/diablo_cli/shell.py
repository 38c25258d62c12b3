"""What the verbs share: the application, where they write to, and what they refuse."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Fine-tune language models by their diagonal blocks: from a data file to a merged model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
progress = Console(stderr=True, highlight=False)

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


def quiet() -> None:
    """Keep the libraries' own bars and advice off the terminal; what matters is reported by diablo."""
    import warnings

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets

    datasets.disable_progress_bars()
    with contextlib.suppress(ImportError):
        # gptqmodel's log, which opens with a banner.
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")
