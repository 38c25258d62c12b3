"""Docstrings as the site's pages need them: their references and examples are written for help() and editors."""

from __future__ import annotations

import re
from typing import Any

import griffe

# :func:`name`, :class:`~room.name` and the like: the name alone is code in Markdown.
ROLE = re.compile(r":\w+:`~?([^`]+)`")
# Two colons before an indented example: Markdown needs one, for the reader.
EXAMPLE = re.compile(r"::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Turns what reStructuredText writes into what Markdown does."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change an object's docstring once it is read."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(":", ROLE.sub(r"`\1`", obj.docstring.value))
