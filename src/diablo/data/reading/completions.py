"""Records to rows whose completions are learned: prompt and completion, conversations, instructions and documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.reading.images import column_images, place_images
from diablo.data.reading.turns import read_conversation, read_tools, read_turns
from diablo.data.reading.values import text_of, texts_of
from diablo.data.rows import Row, Turn, instruction_row

_ROLES = ("user", "assistant")


def from_messages(number: int, record: Mapping[str, Any]) -> Row:
    """A conversation under ``messages``."""
    return _conversation(number, "messages", record)


def from_conversations(number: int, record: Mapping[str, Any]) -> Row:
    """A conversation under ``conversations``, as ShareGPT's data has it."""
    return _conversation(number, "conversations", record)


def _conversation(number: int, key: str, record: Mapping[str, Any]) -> Row:
    messages = place_images(record, read_conversation(key, record[key]))
    return Row(number, messages=messages, tools=read_tools(record.get("tools")))


def from_prompt(number: int, record: Mapping[str, Any]) -> Row:
    """A prompt and its completion, both text or both lists of turns."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        whole = read_conversation("completion", [*as_context(prompt), *read_turns("completion", completion)])
        return Row(number, messages=place_images(record, whole), tools=read_tools(record.get("tools")))
    texts = texts_of(record, "prompt", "completion")
    if read_tools(record.get("tools")):
        raise NoRowError("has tools and a prompt that is text", "give prompt and completion as lists of messages")
    if column_images(record):
        # An image stands in a turn.
        asked, answered = ({"role": role, "content": text} for role, text in zip(_ROLES, texts, strict=True))
        return Row(number, messages=place_images(record, [asked, answered]))
    return Row(number, *texts)


def as_context(turns: Any, key: str = "prompt") -> list[Turn]:
    """Turns that a completion goes on from: what the assistant has said in them is not trained on.

    Raises:
        NoRowError: they are no turns.
    """
    return [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in read_turns(key, turns)]


def from_instruction(number: int, record: Mapping[str, Any]) -> Row:
    """An instruction and its output, as Alpaca's data has them."""
    instruction, output = texts_of(record, "instruction", "output")
    context = record.get("input")
    return instruction_row(number, instruction, output, text_of({"input": context or ""}, "input"))


def from_text(number: int, record: Mapping[str, Any]) -> Row:
    """A document."""
    text = text_of(record, "text")
    if not text.strip():
        raise NoRowError("text is empty", "give the text that is to be trained on")
    return Row(number, text=text)
