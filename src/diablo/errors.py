"""The error that a user can mend, and words for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used. Each line names what was given, what is allowed and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Somebody asked a run to stop, and it has.

    Args:
        message: how to go on.
        signal: what asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.status = 128 + signal


def first_line(error: Exception) -> str:
    """The first line of what a library says of an error, for a message of one line; its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shortened(value: object, most: int = 80) -> str:
    """A value as Python writes it, cut to the most characters that an error message shows of it."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def did_you_mean(given: str, allowed: Iterable[object]) -> str:
    """The end of a message about an unknown name: the closest that there is, or nothing where none is close."""
    close = difflib.get_close_matches(given, [str(name) for name in allowed], n=1)
    return f" Did you mean {close[0]}?" if close else ""
