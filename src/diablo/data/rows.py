"""Users' files to rows. Each row is read as one of three forms, and a row that is none of them is named by its number.

- ``prompt`` and ``completion``: two strings;
- ``messages``: a list of ``{"role": ..., "content": ...}`` that ends with an assistant's turn;
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

from diablo.errors import UserError

FORMATS = (".jsonl", ".json", ".parquet", ".jsonl.gz")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """A row to train on: either a prompt and its completion, or a conversation.

    Attributes:
        number: where the row stands in its file: line of a .jsonl, position in others, from 1.
        prompt: text before the completion; empty where ``messages`` is given.
        completion: text that is trained on; empty where ``messages`` is given.
        messages: a conversation whose assistant turns are trained on.
        user: what the user says where the prompt is put as a conversation, if that is not the prompt itself.
    """

    number: int
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    user: str = ""

    def as_messages(self) -> tuple[dict[str, str], ...]:
        """The row as a conversation: a prompt becomes the user's turn, its completion the assistant's."""
        return self.messages or (
            {"role": "user", "content": (self.user or self.prompt).strip()},
            {"role": "assistant", "content": self.completion.strip()},
        )


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be used, and why."""

    number: int
    reason: str


def read_rows(path: Path, *, on_malformed: str = "error") -> tuple[list[Row], list[RowFault]]:
    """Read a dataset file.

    Args:
        path: a ``.jsonl`` (or ``.jsonl.gz``), ``.json`` (one list) or ``.parquet`` file.
        on_malformed: ``"error"`` refuses the file where a row is malformed; ``"skip"`` leaves such rows out.

    Returns:
        The rows, and what was left out.

    Raises:
        UserError: the file cannot be read, has no usable row, or has malformed rows; these are named by number.
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
        listed = "; ".join(f"row {fault.number}: {fault.reason}" for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(
            f"{path} has {len(faults)} malformed of {len(records)} rows: {listed}{more}. "
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
        return RowFault(number, "not valid JSON")


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
        records = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from None
    return enumerate(records, start=1)


_READERS = dict(zip(FORMATS, (_read_jsonl, _read_json, _read_parquet, _read_jsonl), strict=True))


def _to_row(number: int, record: Any) -> Row | RowFault:
    if not isinstance(record, dict):
        return RowFault(number, f"a {type(record).__name__}, not an object")
    if "messages" in record:
        return _from_messages(number, record["messages"])
    if "prompt" in record or "completion" in record:
        keys = ("prompt", "completion")
    elif "instruction" in record or "output" in record:
        keys = ("instruction", "output")
    else:
        keys_found = ", ".join(str(key) for key in list(record)[:6]) or "no keys"
        return RowFault(number, f"has {keys_found}; needs prompt and completion, messages, or instruction and output")
    for key in keys:
        if not isinstance(record.get(key), str):
            return RowFault(number, f"{key} is {describe_value(record, key)}, not text")
        if not is_unicode(record[key]):
            return RowFault(number, f"{key} is not valid Unicode")
    first, answer = (record[key] for key in keys)
    if not answer.strip():
        return RowFault(number, f"{keys[1]} is empty")
    if keys[0] == "prompt":
        return Row(number, first, answer)
    context = record.get("input") or ""
    if not isinstance(context, str):
        return RowFault(number, f"input is {describe_value(record, 'input')}, not text")
    if not is_unicode(context):
        return RowFault(number, "input is not valid Unicode")
    return instruction_row(number, first, answer, context)


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
        return RowFault(number, "messages is not a list of turns")
    turns = []
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            return RowFault(number, "a turn has no content that is text")
        if turn.get("role") not in _ROLES:
            return RowFault(number, f"a turn has the role {turn.get('role')!r}; allowed: {', '.join(_ROLES)}")
        if not is_unicode(turn["content"]):
            return RowFault(number, "a turn is not valid Unicode")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        return RowFault(number, "does not end with an assistant's turn")
    return Row(number, messages=tuple(turns))


def is_unicode(text: str) -> bool:
    """Whether a tokenizer takes the text: JSON can spell half of a surrogate pair, which is none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def describe_value(record: dict[str, Any], key: str) -> str:
    """What a record has at a key, for a message about its being something else."""
    if key not in record:
        return "missing"
    return "null" if record[key] is None else f"a {type(record[key]).__name__}"
