"""Users' files to rows. Each row is read as one of three forms, and a row that is none of them is named by its number.

- ``prompt`` and ``completion``: two strings;
- ``messages``: a list of ``{"role": ..., "content": ...}`` that ends with an assistant's turn and begins with another;
- ``instruction``, ``output`` and optionally ``input``: strings, as Alpaca's data has them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diablo.data.faults import OPENS_WITH_ANSWER, RowFault, explain_faults
from diablo.errors import UserError, first_line, shortened

FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz")
_ROLES = ("system", "user", "assistant", "tool")
_FORMS = "prompt and completion, messages, or instruction and output"
_A_TURN = '{"role": "user", "content": "..."}'
MEND_UNICODE = "it has half of a surrogate pair, so write the character itself"
"""What to do about text that :func:`is_unicode` refuses."""


@dataclass(frozen=True)
class Row:
    """A row to train on: either a prompt and its completion, or a conversation.

    Attributes:
        number: where the row stands in its file: line of a .jsonl, position in others, from 1.
        prompt: text before the completion; empty where ``messages`` is given.
        completion: text that is trained on; empty where ``messages`` is given.
        messages: a conversation whose assistant turns are trained on.
        user: what the user says where the prompt is put as a conversation, if that is not the prompt itself.
        tools: the tools that a conversation offers, as JSON schemas.
    """

    number: int
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    user: str = ""
    tools: tuple[dict[str, Any], ...] = ()

    def as_messages(self) -> tuple[dict[str, Any], ...]:
        """The row as a conversation: a prompt becomes the user's turn, its completion the assistant's."""
        return self.messages or (
            {"role": "user", "content": (self.user or self.prompt).strip()},
            {"role": "assistant", "content": self.completion.strip()},
        )


def read_rows(path: Path, *, on_malformed: str = "error") -> tuple[list[Row], list[RowFault]]:
    """Read a dataset file.

    Args:
        path: a ``.jsonl`` (or ``.jsonl.gz``), ``.json`` (one list) or ``.parquet`` file.
        on_malformed: ``"error"`` refuses the file where a row is malformed; ``"skip"`` leaves such rows out.

    Returns:
        The rows, and what was left out.

    Raises:
        UserError: the file cannot be read, has no usable row, or has malformed rows; each reason is said once, with the
            numbers of its rows.
    """
    records = read_records_of(path)
    rows: list[Row] = []
    faults: list[RowFault] = []
    for number, record in records:
        row = record if isinstance(record, RowFault) else _to_row(number, record)
        if isinstance(row, RowFault):
            faults.append(row)
        else:
            rows.append(row)
    if faults and on_malformed == "error":
        raise UserError(
            f"{path} has {len(faults)} malformed of {len(records)} rows. {explain_faults(faults)} "
            "Mend them, or set data.on_malformed=skip to leave them out."
        )
    if not rows:
        raise UserError(f"{path} has no usable row (of {len(records)}); there is nothing to train on.")
    return rows, faults


def read_records_of(path: Path) -> list[tuple[int, Any]]:
    """The records of a dataset file as they stand there, each with its number: line of a .jsonl, position in others.

    A line that is no JSON is given as a :class:`RowFault`.

    Raises:
        UserError: the file cannot be read.
    """
    reader = next((reader for ending, reader in _READERS.items() if path.name.endswith(ending)), None)
    if reader is None:
        raise UserError(f"{path} is not a dataset that diablo reads; allowed: {', '.join(FORMATS)}.")
    try:
        return list(reader(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start} cannot be read).") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_json(number, line)


def _parse_json(number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return RowFault(number, "not valid JSON", "write one JSON object a line")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}. One object a line makes a .jsonl file.") from None
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a JSON list of rows, found {type(records).__name__}.")
    return enumerate(records, start=1)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {first_line(error)}") from None
    columns = [_column_of(path, name, values) for name, values in zip(table.column_names, table.columns, strict=True)]
    names = table.column_names
    return enumerate((dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)), start=1)


def _column_of(path: Path, name: str, values: Any) -> list[Any]:
    try:
        return values.to_pylist()
    # Such as a date in the year 5 million.
    except (ValueError, OverflowError, LookupError, NotImplementedError) as error:
        raise UserError(
            f"{path}: the column {name!r} has a value that cannot be read ({first_line(error)}); mend it, or leave the "
            "column out."
        ) from None


_READERS = dict(zip(FORMATS, (_read_jsonl, _read_json, _read_parquet, _read_jsonl), strict=True))


def _to_row(number: int, record: Any) -> Row | RowFault:
    if not isinstance(record, dict):
        return RowFault(number, f"{_kind_of(record)}, not an object", f"give an object with {_FORMS}")
    if "messages" in record:
        return _from_messages(number, record["messages"])
    if "prompt" in record or "completion" in record:
        keys = ("prompt", "completion")
    elif "instruction" in record or "output" in record:
        keys = ("instruction", "output")
    else:
        keys_found = ", ".join(str(key) for key in list(record)[:6]) or "no keys"
        return RowFault(number, f"has {keys_found}", f"needs {_FORMS}")
    for key in keys:
        if fault := _text_fault(number, key, record):
            return fault
    first, answer = (record[key] for key in keys)
    if not answer.strip():
        return RowFault(number, f"{keys[1]} is empty", "give the text that is to be trained on")
    if keys[0] == "prompt":
        return Row(number, first, answer)
    record = record | {"input": record.get("input") or ""}
    return _text_fault(number, "input", record) or instruction_row(number, first, answer, record["input"])


def _text_fault(number: int, key: str, record: dict[str, Any]) -> RowFault | None:
    """What is wrong with a value that is to be text."""
    value = record.get(key)
    if not isinstance(value, str):
        mend = (
            "give it" if value is None else "put it in quotes" if isinstance(value, (int, float)) else "give one text"
        )
        return RowFault(number, f"{key} is {describe_value(record, key)}, not text", mend)
    return None if is_unicode(value) else RowFault(number, f"{key} is not valid Unicode", MEND_UNICODE)


def instruction_row(number: int, instruction: str, output: str, context: str = "") -> Row:
    """A row of an instruction, optionally what it is about, and the response, as Alpaca's data has them."""
    sections = [
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{context}"] if context else []),
        "### Response:\n",
    ]
    user = f"{instruction}\n\n{context}" if context else instruction
    return Row(number, "\n\n".join(sections), output, user=user)


def _from_messages(number: int, messages: Any) -> Row | RowFault:
    if not isinstance(messages, list) or not messages:
        return RowFault(number, "messages is not a list of turns", f"give turns such as {_A_TURN}")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return RowFault(number, "a turn has no content that is text", f"give turns such as {_A_TURN}")
        role, content = turn.get("role"), turn["content"]
        if role not in _ROLES:
            return RowFault(number, f"a turn has the role {shortened(role)}", f"allowed: {', '.join(_ROLES)}")
        if not is_unicode(content):
            return RowFault(number, "a turn is not valid Unicode", MEND_UNICODE)
        if role == "assistant" and not content.strip():
            return RowFault(number, "an assistant's turn is empty", "give the text that is to be trained on")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "assistant":
        return RowFault(number, "does not end with an assistant's turn", "put the answer at its end")
    if turns[0]["role"] == "assistant":
        return RowFault(number, *OPENS_WITH_ANSWER)
    return Row(number, messages=tuple(turns))


def is_unicode(text: str) -> bool:
    """Whether a tokenizer takes the text: JSON can spell half of a surrogate pair, which is none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def describe_value(record: dict[str, Any], key: str) -> str:
    """What a record has at a key, for a message about its being something else."""
    return _kind_of(record[key]) if key in record else "missing"


def _kind_of(value: Any) -> str:
    """What a value is in the words of JSON, with an article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
