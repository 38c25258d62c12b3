"""Records of files to rows. The columns of a record say which format it has; a record of none says what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.reading import completions, labels, preferences, prompts, similar
from diablo.data.reading.images import COLUMNS, WITHOUT_IMAGES, column_images
from diablo.data.reading.values import MissingColumnError
from diablo.data.rows import Row, RowKind, kind_of

_MOST_COLUMNS_NAMED = 6
# What others call some columns, the usual names first.
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "source", "context", "user")
_TEXTS = ("text", "sentence", "review", "content", "document", "body", "message", "comment", "question", "prompt")
_COMPLETIONS = ("completion", "output", "answer", "response", "solution", "target", "assistant", "reply")
_OTHER_NAMES: dict[RowKind, dict[str, tuple[str, ...]]] = {
    "completions": {"prompt": _PROMPTS, "completion": _COMPLETIONS},
    "pairs": {
        "prompt": _PROMPTS,
        "chosen": ("chosen", "better", "preferred", "chosen_response", "response_chosen", "positive", "win"),
        "rejected": ("rejected", "worse", "dispreferred", "rejected_response", "response_rejected", "negative", "lose"),
    },
    "judged": {
        "prompt": _PROMPTS,
        "completion": _COMPLETIONS,
        "label": ("label", "desirable", "is_good", "good", "thumbs_up", "liked", "correct", "judgement"),
    },
    "prompts": {"prompt": _PROMPTS},
    "labelled": {"text": _TEXTS, "label": ("label", "labels", "class", "category", "sentiment", "intent", "topic")},
    "numbered": {"text": _TEXTS, "label": ("label", "score", "rating", "value", "target", "stars")},
    "texts": {
        "anchor": ("anchor", "query", "question", "title", "premise", "sentence1", "text1", "text"),
        "positive": ("positive", "pos", "answer", "passage", "document", "context", "abstract", "body", "sentence2"),
    },
    "tagged": {"tokens": ("tokens", "words"), "labels": ("labels", "ner_tags", "tags", "pos_tags", "chunk_tags")},
}


@dataclass(frozen=True)
class Format:
    """A format of records.

    Attributes:
        required: the columns that it must have.
        optional: those that it may have.
        read: a record that has the format to a row, given its number. It raises a :class:`NoRowError`.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[int, Mapping[str, Any]], Row]


FORMATS: dict[RowKind, dict[str, Format]] = {
    "completions": {
        "messages": Format(("messages",), ("tools", *COLUMNS), completions.from_messages),
        "ShareGPT": Format(("conversations",), ("tools", *COLUMNS), completions.from_conversations),
        "prompt/completion": Format(("prompt", "completion"), ("tools", *COLUMNS), completions.from_prompt),
        "Alpaca": Format(("instruction", "output"), ("input",), completions.from_instruction),
        "text": Format(("text",), (), completions.from_text),
    },
    "pairs": {"pairs": Format(("chosen", "rejected"), ("prompt", "tools"), preferences.from_pair)},
    "judged": {
        # A missing label is a fault of the row, whichever of the two it has.
        "judged messages": Format(("messages",), ("label", "tools"), preferences.from_judgement),
        "judged": Format(("prompt", "completion", "label"), ("tools",), preferences.from_judgement),
    },
    "prompts": {"prompts": Format(("prompt",), ("tools",), prompts.from_prompt_alone)},
    "labelled": {"labelled": Format(("text", "label"), ("text_pair",), labels.from_labelled)},
    "numbered": {"numbered": Format(("text", "label"), ("text_pair",), labels.from_numbered)},
    "tagged": {
        "tagged": Format(("tokens", "labels"), (), labels.from_tagged),
        "CoNLL": Format(("tokens", "ner_tags"), (), labels.from_tagged),
    },
    "texts": {
        "anchors": Format(("anchor", "positive"), similar.NEGATIVES, similar.from_anchor),
        "scored": Format(("sentence1", "sentence2", "score"), (), similar.from_scored),
        "labelled pairs": Format(("sentence1", "sentence2", "label"), (), similar.from_scored),
    },
}
"""The formats by name, for each kind of rows. A record that could have several has the first of them."""

_NEEDED: dict[RowKind, str] = {
    "completions": "prompt and completion, messages, conversations, instruction and output, or text",
    "pairs": "prompt, chosen and rejected",
    "judged": "prompt, completion and label",
    "prompts": "prompt",
    "labelled": "text and label",
    "numbered": "text and label, a number",
    "tagged": "tokens and labels, or tokens and ner_tags",
    "texts": "anchor and positive, or sentence1, sentence2 and score",
}
# The kinds that have columns of their own, by which a record tells that it is one of them.
_TOLD_BY: dict[RowKind, tuple[str, ...]] = {
    "tagged": (),
    "texts": (),
    "judged": ("label",),
    "pairs": (),
    "labelled": (),
    "completions": (),
}
_OBJECTIVES: dict[RowKind, str] = {
    "completions": "sft",
    "pairs": "dpo",
    "judged": "kto",
    "labelled": "classification",
    "tagged": "token_classification",
    "texts": "embedding",
}


def format_of(columns: Mapping[str, Any], kind: RowKind = "completions") -> str | None:
    """The name of the format that a record has, of which it may lack a column; None where it has no column of any.

    In tables with records of several formats the columns of the others are there too, and null.
    """
    for found in ({key for key, value in columns.items() if value is not None}, columns.keys()):
        for name, each in FORMATS[kind].items():
            if any(key in found for key in each.required):
                return name
    return None


def to_row(number: int, record: Any, kind: RowKind = "completions") -> tuple[Row, str]:
    """A record as a row.

    Args:
        number: where it stands in its file.
        record: what stands there.
        kind: what kind of row it is to be.

    Returns:
        The row and the name of its format.

    Raises:
        NoRowError: it is no record of any format of that kind, or one with a fault.
    """
    if not isinstance(record, dict):
        raise NoRowError(f"{kind_of(record)}, not an object", f"give an object with {_NEEDED[kind]}")
    name = format_of(record, kind)
    other = _other_kind(record, kind)
    if name is None or (other and not set(FORMATS[kind][name].required) <= record.keys()):
        raise NoRowError(f"has {name_columns(record)}", f"needs {_NEEDED[kind]}{other or _proposal(record, kind)}")
    form = FORMATS[kind][name]
    if column_images(record) and not {*COLUMNS} <= {*form.optional}:
        raise NoRowError(*(WITHOUT_IMAGES if kind != "completions" else _of_no_turn(name)))
    try:
        return form.read(number, record), name
    except MissingColumnError as error:
        raise NoRowError(error.reason, f"{error.mend}{_proposal(record, kind)}") from None


def _of_no_turn(name: str) -> tuple[str, str]:
    """What is wrong with images in a format that has no place for them, and how to mend it."""
    return f"has images, which rows of the format {name} have no place for", "give messages, or prompt and completion"


def _other_kind(record: Mapping[str, Any], kind: RowKind) -> str:
    """Which objective a record is for that has all columns of another kind of rows, in words; empty where it has none.

    Those that have columns which no other kind has come first, since these are the more telling ones.
    """
    for other, told_by in _TOLD_BY.items():
        complete = any({*each.required, *told_by} <= record.keys() for each in FORMATS[other].values())
        if other != kind and complete:
            return f"; it has what objective: {_OBJECTIVES[other]} needs"
    return ""


def name_columns(record: Mapping[str, Any]) -> str:
    """The first columns of a record, for a message."""
    return ", ".join(str(key) for key in list(record)[:_MOST_COLUMNS_NAMED]) or "no keys"


def proposed_columns(record: Mapping[str, Any], kind: RowKind = "completions") -> dict[str, str] | None:
    """The ``data.columns`` that would make a row of a record, if some of its columns are called as such often are."""
    found = {
        key: next((name for name in names if record.get(name) is not None), None)
        for key, names in _OTHER_NAMES[kind].items()
    }
    named = {key: name for key, name in found.items() if name is not None}
    return named if len(named) == len(found) else None


def _proposal(record: Mapping[str, Any], kind: RowKind) -> str:
    """How ``data.columns`` would make a row of a record, in words."""
    columns = proposed_columns(record, kind)
    if columns is None:
        return f"; or say with data.columns which they are of {name_columns(record)}" if record else ""
    listed = ", ".join(f"{name}: {column}" for name, column in columns.items())
    return f"; or say which columns these are with data.columns: {{{listed}}}"
