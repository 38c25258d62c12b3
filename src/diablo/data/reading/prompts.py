"""Records to rows that are prompts alone, which the model completes while it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diablo.data.faults import OPENS_WITH_ANSWER, NoRowError
from diablo.data.reading.completions import as_context
from diablo.data.reading.turns import read_tools
from diablo.data.reading.values import text_of
from diablo.data.rows import Row

_OWN = ("prompt", "tools")


def from_prompt_alone(number: int, record: Mapping[str, Any]) -> Row:
    """A prompt, which is text or a list of turns; the record's other columns are kept for the rewards."""
    columns = {key: value for key, value in record.items() if key not in _OWN}
    prompt, tools = record.get("prompt"), read_tools(record.get("tools"))
    if isinstance(prompt, list):
        turns = as_context(prompt)
        if turns[0]["role"] == "assistant":
            raise NoRowError(*OPENS_WITH_ANSWER)
        if turns[-1]["role"] == "assistant":
            raise NoRowError("prompt ends with the assistant's turn", "leave that turn out: the model is to write it")
        # The place of the answer, which is not there yet.
        return Row(number, messages=(*turns, {"role": "assistant", "content": ""}), tools=tools, columns=columns)
    text = text_of(record, "prompt")
    if not text.strip():
        raise NoRowError("prompt is empty", "give the text that is to be completed")
    if tools:
        raise NoRowError("has tools and a prompt that is text", "give prompt as a list of messages")
    return Row(number, text, columns=columns)
