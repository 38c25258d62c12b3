"""The error that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used. Each line names what was given, what is allowed and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def did_you_mean(given: str, allowed: Iterable[object]) -> str:
    """The end of a message about an unknown name: the closest that there is, or nothing where none is close."""
    close = difflib.get_close_matches(given, [str(name) for name in allowed], n=1)
    return f" Did you mean {close[0]}?" if close else ""
