"""Values of records that are to be text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.rows import MEND_UNICODE, describe_value, is_unicode


class MissingColumnError(NoRowError):
    """A record lacks a column of its format."""


def text_of(record: Mapping[str, Any], key: str) -> str:
    """A value that is to be text.

    Raises:
        NoRowError: it is none.
    """
    value = record.get(key)
    if isinstance(value, str):
        if not is_unicode(value):
            raise NoRowError(f"{key} is not valid Unicode", MEND_UNICODE)
        return value
    if key not in record:
        raise MissingColumnError(f"{key} is missing, not text", "give it")
    mend = "give one text"
    if value is None:
        mend = "give it"
    elif isinstance(value, (int, float)):
        mend = "put it in quotes, or name the column in data.columns"
    raise NoRowError(f"{key} is {describe_value(record, key)}, not text", mend)


def texts_of(record: Mapping[str, Any], first: str, answer: str) -> tuple[str, str]:
    """The text of a prompt and that of its completion, which has to have some.

    Raises:
        NoRowError: one is no text, or the completion is empty.
    """
    texts = text_of(record, first), text_of(record, answer)
    if not texts[1].strip():
        raise NoRowError(f"{answer} is empty", "give the text that is to be trained on")
    return texts
