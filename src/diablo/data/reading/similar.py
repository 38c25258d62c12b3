"""Records to rows of texts that are compared: what belongs to an anchor and what does not, or how near two are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.reading.values import MissingColumnError, text_of
from diablo.data.rows import Row
from diablo.errors import shortened

NEGATIVES = ("negative", *(f"negative_{number}" for number in range(1, 17)))
"""The columns of texts that do not belong to the anchor."""


def from_anchor(number: int, record: Mapping[str, Any]) -> Row:
    """An ``anchor``, a ``positive`` that belongs to it, and maybe ``negative`` ones that do not: texts, or one list."""
    texts = [_text(record, "anchor"), _text(record, "positive")]
    for key in NEGATIVES:
        if (given := record.get(key)) is None:
            continue
        several = list(given) if isinstance(given, (list, tuple)) else [given]
        texts += [_text({key: each}, key) for each in several]
    if texts[0] == texts[1]:
        raise NoRowError("anchor and positive are the same text", "give two texts, or leave the row out")
    if texts[1] in texts[2:]:
        raise NoRowError("positive and a negative are the same text", "give texts that differ")
    return Row(number, texts[0], others=tuple(texts[1:]))


def from_scored(number: int, record: Mapping[str, Any]) -> Row:
    """Two texts, ``sentence1`` and ``sentence2``, with a number, ``score`` or ``label``: the larger, the nearer."""
    texts = _text(record, "sentence1"), _text(record, "sentence2")
    key = "label" if record.get("score") is None and record.get("label") is not None else "score"
    if key not in record:
        raise MissingColumnError("score is missing", "give it")
    given = record[key]
    try:
        value = float(given) if isinstance(given, (int, float, str)) else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise NoRowError(f"{key} is {shortened(given)}, no finite number", "give a number, the larger the nearer")
    return Row(number, texts[0], others=(texts[1],), label=value)


def _text(record: Mapping[str, Any], key: str) -> str:
    text = text_of(record, key)
    if not text.strip():
        raise NoRowError(f"{key} is empty", "give the text that is compared")
    return text
