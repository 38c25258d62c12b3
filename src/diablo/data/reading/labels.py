"""Records to rows whose texts are labelled: a label or a number for a text, or a label for each of its words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.reading.values import MissingColumnError, text_of
from diablo.data.rows import MEND_UNICODE, Row, is_unicode
from diablo.errors import shortened

_MEND_LABEL = "give a text, an integer or true or false"


def from_labelled(number: int, record: Mapping[str, Any]) -> Row:
    """A text, or two of them, and its ``label``: a text, an integer, true or false, or a list of these."""
    given = _given(record, "label")
    label = tuple(map(_label, given)) if isinstance(given, (list, tuple)) else _label(given)
    return _row(number, record, label)


def from_numbered(number: int, record: Mapping[str, Any]) -> Row:
    """A text, or two of them, and a number, ``label``."""
    given = _given(record, "label")
    try:
        value = float(given) if isinstance(given, (int, float, str)) and not isinstance(given, bool) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NoRowError(f"label is {shortened(given)}, no finite number", "give a number")
    return _row(number, record, value)


def from_tagged(number: int, record: Mapping[str, Any]) -> Row:
    """The words of a text, ``tokens``, and a label for each of them: ``labels`` or ``ner_tags``."""
    key = "ner_tags" if record.get("labels") is None and record.get("ner_tags") is not None else "labels"
    words, tags = (_given(record, name) for name in ("tokens", key))
    for name, values in (("tokens", words), (key, tags)):
        if not isinstance(values, (list, tuple)) or not values:
            raise NoRowError(f"{name} is {shortened(values)}, no list of any", "give the words and their labels")
    if not all(isinstance(word, str) and word.strip() for word in words):
        raise NoRowError("tokens has what is no word", "give each word as a text")
    if not all(map(is_unicode, words)):
        raise NoRowError("tokens is not valid Unicode", MEND_UNICODE)
    if len(words) != len(tags):
        raise NoRowError(f"tokens and {key} are not equally many", "give a label for each word")
    return Row(number, label=tuple(map(_label, tags)), words=tuple(words))


def unlabelled(number: int, record: Any, *, words: bool = False) -> Row:
    """A text, or an object with ``text`` and maybe ``text_pair``, or with ``tokens``, whose label is to be found out.

    Args:
        number: where it stands.
        record: the text or the object.
        words: whether it is each word that is labelled; a text is then cut at white space.

    Raises:
        NoRowError: it is neither.
    """
    given = record if isinstance(record, dict) else {"text": record}
    if words and given.get("tokens") is not None:
        return replace(from_tagged(number, {**given, "labels": given["tokens"]}), label=None)
    row = _row(number, given, "")
    return Row(number, words=tuple(row.prompt.split())) if words else replace(row, label=None)


def _given(record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        raise MissingColumnError(f"{key} is missing", "give it")
    return record[key]


def _row(number: int, record: Mapping[str, Any], label: str | float | tuple[str, ...]) -> Row:
    text = text_of(record, "text")
    if not text.strip():
        raise NoRowError("text is empty", "give the text that is labelled")
    pair = text_of(record, "text_pair") if record.get("text_pair") is not None else ""
    return Row(number, text, text_pair=pair, label=label)


def _label(value: Any) -> str:
    """A label as text: 1, 1.0 and "1" are one label, and so are true and "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise NoRowError(f"label is {shortened(value)}", _MEND_LABEL)
    if not is_unicode(value):
        raise NoRowError("label is not valid Unicode", MEND_UNICODE)
    return value.strip()
