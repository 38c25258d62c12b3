"""The error that a user can mend."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used. Each line names what was given, what is allowed and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
