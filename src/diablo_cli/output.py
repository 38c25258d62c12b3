"""Where verbs write: text for people or, with ``--json``, one record for programs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from typer.core import TyperCommand

out = Console(highlight=False, soft_wrap=True)
"""What a verb answers, as text. With ``--json`` it is silent."""
progress = Console(stderr=True, highlight=False)
"""What happens meanwhile."""

_HELP = "Print one JSON record in place of text."
_record_stream: ContextVar[TextIO | None] = ContextVar("_record_stream", default=None)


def answer(record: dict[str, Any]) -> None:
    """Print the record of what a verb did, where ``--json`` asks for it.

    Args:
        record: values of JSON, paths among them. Numbers that are not finite become null.
    """
    stream = _record_stream.get()
    if stream is not None:
        from diablo.records.results import json_text

        stream.write(json_text(record) + "\n")
        stream.flush()


class App(typer.Typer):
    """An application whose verbs take ``--json``."""

    def command(self, *arguments: Any, no_record: str | None = None, **settings: Any) -> Callable[..., Any]:
        """A decorator that makes a function a verb. The function calls :func:`answer` once, with its record.

        Args:
            arguments: as Typer takes them.
            no_record: why the verb has no record and what to do instead, for the user; then ``--json`` is refused.
            settings: as Typer takes them.
        """
        register = super().command(*arguments, cls=_Verb, **settings)

        def decorate(verb: Callable[..., None]) -> Callable[..., None]:
            register(_taking_json(verb, no_record))
            return verb

        return decorate


class _Verb(TyperCommand):
    """A command whose errors of usage are records, too, and say how a setting of a recipe is written."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        given = list(args)  # the parser takes them out of the list
        is_asked_for = "--json" in itertools.takewhile(lambda argument: argument != "--", given)
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except Exception as error:
            if any(parameter.name == "overrides" for parameter in self.params):
                _explain_setting(error, given)
            # Typer's errors of usage have this method; what ends the program at --help does not.
            if is_asked_for and hasattr(error, "format_message"):
                print(json.dumps({"error": error.format_message()}))
            raise


def _explain_setting(error: Any, given: list[str]) -> None:
    """Say how a setting of a recipe is written, where the error is that there is no such option."""
    from diablo.recipes.recipe import Recipe

    option = getattr(error, "option_name", "")
    key = option.removeprefix("--")
    if key.partition(".")[0] in Recipe.model_fields:
        values = [text.partition("=")[2] for text in given if text.startswith(f"{option}=")]
        error.message = f"No such option: {option}; write {key}={(values or ['VALUE'])[0]}, without dashes"


def _taking_json(verb: Callable[..., None], no_record: str | None) -> Callable[..., None]:
    """A verb with the option ``--json`` behind its own parameters."""
    option = Annotated[bool, typer.Option("--json", help=_HELP, hidden=no_record is not None)]

    @functools.wraps(verb)
    def run(*, as_json: bool, **given: Any) -> None:
        with _for_programs() if as_json else contextlib.nullcontext():
            if as_json and no_record is not None:
                from diablo.errors import UserError

                raise UserError(f"--json: {no_record}.")
            verb(**given)

    parameters = inspect.signature(verb, eval_str=True).parameters.values()
    added = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
    run.__signature__ = inspect.Signature([*parameters, added])  # pyrefly: ignore[missing-attribute]
    run.__annotations__ = {**verb.__annotations__, "as_json": option}
    return run


@contextlib.contextmanager
def _for_programs() -> Generator[None]:
    """While a verb runs, standard output is for its record alone, or for one that says why there is none."""
    stream = _record_stream.set(_take_standard_output())
    out.quiet = True
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, KeyboardInterrupt) as error:
        # Each process of a run has the error; one of them says it.
        if os.environ.get("RANK", "0") == "0":
            answer({"error": _described(error)})
        raise
    finally:
        out.quiet = False
        _record_stream.reset(stream)


def _take_standard_output() -> TextIO:
    """A stream to standard output. What others write there goes to standard error, until the process ends.

    Libraries in C and child processes write to the descriptor, not to ``sys.stdout``; some write when Python exits.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # a stream in memory, of whoever calls main() in his own process
        return sys.stdout
    sys.stdout.flush()
    own = os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
    os.dup2(2, descriptor)
    return own


def _described(error: Exception | KeyboardInterrupt) -> str:
    from diablo.errors import Interrupted, UserError, first_line

    if isinstance(error, KeyboardInterrupt):
        return "Stopped at once by SIGINT."
    if isinstance(error, (UserError, Interrupted)):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}"
