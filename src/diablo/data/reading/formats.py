"""Records of files to rows. The columns of a record say which format it has; a record of none says what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.reading.turns import read_conversation, read_tools, read_turns
from diablo.data.rows import MEND_UNICODE, Row, describe_value, instruction_row, is_unicode, kind_of

_NEEDED = "prompt and completion, messages, conversations, instruction and output, or text"
_MOST_COLUMNS_NAMED = 6
# What others call the prompt and the completion, the usual names first.
_PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input", "source", "context", "user")
_COMPLETIONS = ("completion", "output", "answer", "response", "solution", "target", "assistant", "reply")


def _from_messages(number: int, record: Mapping[str, Any]) -> Row:
    return _conversation(number, "messages", record)


def _from_conversations(number: int, record: Mapping[str, Any]) -> Row:
    return _conversation(number, "conversations", record)


def _conversation(number: int, key: str, record: Mapping[str, Any]) -> Row:
    return Row(number, messages=read_conversation(key, record[key]), tools=read_tools(record.get("tools")))


def _from_prompt(number: int, record: Mapping[str, Any]) -> Row:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        # What the prompt's assistant said is what the completion goes on from.
        said = [
            turn | {"train": False} if turn["role"] == "assistant" else turn for turn in read_turns("prompt", prompt)
        ]
        whole = read_conversation("completion", [*said, *read_turns("completion", completion)])
        return Row(number, messages=whole, tools=read_tools(record.get("tools")))
    texts = _texts(record, "prompt", "completion")
    if read_tools(record.get("tools")):
        raise NoRowError("has tools and a prompt that is text", "give prompt and completion as lists of messages")
    return Row(number, *texts)


def _from_instruction(number: int, record: Mapping[str, Any]) -> Row:
    instruction, output = _texts(record, "instruction", "output")
    context = record.get("input")
    return instruction_row(number, instruction, output, _text({"input": context or ""}, "input"))


def _from_text(number: int, record: Mapping[str, Any]) -> Row:
    text = _text(record, "text")
    if not text.strip():
        raise NoRowError("text is empty", "give the text that is to be trained on")
    return Row(number, text=text)


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


FORMATS = {
    "messages": Format(("messages",), ("tools",), _from_messages),
    "ShareGPT": Format(("conversations",), ("tools",), _from_conversations),
    "prompt/completion": Format(("prompt", "completion"), ("tools",), _from_prompt),
    "Alpaca": Format(("instruction", "output"), ("input",), _from_instruction),
    "text": Format(("text",), (), _from_text),
}
"""The formats by name. A record that could have several has the first of them."""


def format_of(columns: Mapping[str, Any]) -> str | None:
    """The name of the format that a record has, of which it may lack a column; None where it has no column of any.

    In tables with records of several formats the columns of the others are there too, and null.
    """
    for found in ({key for key, value in columns.items() if value is not None}, columns.keys()):
        for name, each in FORMATS.items():
            if any(key in found for key in each.required):
                return name
    return None


def to_row(number: int, record: Any) -> tuple[Row, str]:
    """A record as a row.

    Args:
        number: where it stands in its file.
        record: what stands there.

    Returns:
        The row and the name of its format.

    Raises:
        NoRowError: it is no record of any format, or one with a fault.
    """
    if not isinstance(record, dict):
        raise NoRowError(f"{kind_of(record)}, not an object", f"give an object with {_NEEDED}")
    name = format_of(record)
    if name is None:
        raise NoRowError(f"has {name_columns(record)}", f"needs {_NEEDED}{_proposal(record)}")
    return FORMATS[name].read(number, record), name


def name_columns(record: Mapping[str, Any]) -> str:
    """The first columns of a record, for a message."""
    return ", ".join(str(key) for key in list(record)[:_MOST_COLUMNS_NAMED]) or "no keys"


def proposed_columns(record: Mapping[str, Any]) -> dict[str, str] | None:
    """The ``data.columns`` that would make a row of a record, if some of its columns are called as such often are."""
    prompt, completion = (
        next((name for name in names if record.get(name) is not None), None) for names in (_PROMPTS, _COMPLETIONS)
    )
    return None if prompt is None or completion is None else {"prompt": prompt, "completion": completion}


def _proposal(record: Mapping[str, Any]) -> str:
    """How ``data.columns`` would make a row of a record, in words."""
    columns = proposed_columns(record)
    if columns is None:
        return f"; or say with data.columns which they are of {name_columns(record)}" if record else ""
    listed = ", ".join(f"{name}: {column}" for name, column in columns.items())
    return f"; or say which columns these are with data.columns: {{{listed}}}"


def _texts(record: Mapping[str, Any], first: str, answer: str) -> tuple[str, str]:
    """The text of a prompt and that of its completion, which has to have some."""
    texts = _text(record, first), _text(record, answer)
    if not texts[1].strip():
        raise NoRowError(f"{answer} is empty", "give the text that is to be trained on")
    return texts


def _text(record: Mapping[str, Any], key: str) -> str:
    """A value that is to be text."""
    value = record.get(key)
    if isinstance(value, str):
        if not is_unicode(value):
            raise NoRowError(f"{key} is not valid Unicode", MEND_UNICODE)
        return value
    mend = "give one text"
    if value is None:
        mend = f"give it{_proposal(record) if key not in record else ''}"
    elif isinstance(value, (int, float)):
        mend = "put it in quotes, or name the column in data.columns"
    raise NoRowError(f"{key} is {describe_value(record, key)}, not text", mend)
