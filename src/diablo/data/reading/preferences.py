"""Records to rows that say which completion is better: pairs of completions, and completions that are judged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diablo.data.faults import NoRowError
from diablo.data.reading.completions import as_context, from_messages, from_prompt
from diablo.data.reading.turns import parsed, read_conversation, read_tools, read_turns
from diablo.data.reading.values import MissingColumnError, text_of
from diablo.data.rows import Row, Turn
from diablo.errors import shortened

_JUDGEMENTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def from_pair(number: int, record: Mapping[str, Any]) -> Row:
    """A better and a worse completion, ``chosen`` and ``rejected``, with their ``prompt`` or with it inside of both.

    All are text, or the completions are lists of turns: those of the answer alone, or of the whole conversation.
    """
    better, worse = parsed(record.get("chosen")), parsed(record.get("rejected"))
    if isinstance(better, list) and isinstance(worse, list):
        return _conversations(number, record, better, worse)
    texts = text_of(record, "chosen"), text_of(record, "rejected")
    if read_tools(record.get("tools")):
        raise NoRowError("has tools and completions that are text", "give chosen and rejected as lists of messages")
    if record.get("prompt") is None:
        prompt = _common_start(*texts)
        texts = texts[0][len(prompt) :], texts[1][len(prompt) :]
    else:
        prompt = text_of(record, "prompt")
    for key, text in zip(("chosen", "rejected"), texts, strict=True):
        if not text.strip():
            raise NoRowError(f"{key} is empty", "give the text of a completion")
    _check_distinct(*texts)
    return Row(number, prompt, texts[0], rejected=Row(number, prompt, texts[1]))


def _conversations(number: int, record: Mapping[str, Any], better: list[Any], worse: list[Any]) -> Row:
    wholes = [_whole(record.get("prompt"), key, turns) for key, turns in (("chosen", better), ("rejected", worse))]
    shared = 0
    for one, other in zip(*wholes, strict=False):
        if one != other:
            break
        shared += 1
    # One answer may go on where the other one ends: its last turn is then part of the answer.
    shared = min(shared, *(len(whole) - 1 for whole in wholes))
    _check_distinct(wholes[0][shared:], wholes[1][shared:])
    tools = read_tools(record.get("tools"))
    rows = [
        Row(number, messages=read_conversation(key, [*as_context(whole[:shared], key), *whole[shared:]]), tools=tools)
        if shared
        else Row(number, messages=read_conversation(key, whole), tools=tools)
        for key, whole in zip(("chosen", "rejected"), wholes, strict=True)
    ]
    return replace(rows[0], rejected=rows[1])


def _whole(prompt: Any, key: str, turns: list[Any]) -> list[Turn]:
    """The turns of a completion with those of its prompt, which data sets also repeat within the completion."""
    completion = list(read_turns(key, turns))
    if completion[0]["role"] != "assistant" or prompt is None:
        return completion
    prompt = parsed(prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [*read_turns("prompt", prompt), *completion]


def _common_start(better: str, worse: str) -> str:
    """The prompt of two texts that both begin with it: what they share, up to the last white space in it."""
    end = next((index for index, (one, other) in enumerate(zip(better, worse, strict=False)) if one != other), None)
    words = re.match(r"(.*\S)(?=\s)", better[:end], re.DOTALL)
    if words is None:
        raise NoRowError("has no prompt, and chosen and rejected do not begin alike", "give the prompt")
    return words[1]


def _check_distinct(better: Any, worse: Any) -> None:
    if better == worse:
        raise NoRowError("chosen and rejected are the same", "leave the row out: there is nothing to prefer in it")


def to_score(number: int, record: Any) -> Row:
    """A completion that is to be scored: a text, or an object with ``prompt`` and ``completion``, or with ``messages``.

    Raises:
        NoRowError: it is none of them.
    """
    if isinstance(record, str):
        return Row(number, completion=record)
    if not isinstance(record, dict) or not {"messages", "completion"} & record.keys():
        raise NoRowError("no completion to score", "give a text, prompt and completion, or messages")
    return (from_prompt if record.get("messages") is None else from_messages)(number, record)


def from_judgement(number: int, record: Mapping[str, Any]) -> Row:
    """A completion and whether it is good: ``label`` beside ``prompt`` and ``completion``, or beside ``messages``."""
    if "label" not in record:
        raise MissingColumnError("label is missing", "give true for a good completion and false for a bad one")
    label = record["label"]
    spelled = str(label).lower() if isinstance(label, (bool, int, float, str)) else ""
    if spelled not in _JUDGEMENTS:
        raise NoRowError(f"label is {shortened(label)}", "give true for a good completion and false for a bad one")
    read = from_prompt if record.get("messages") is None else from_messages
    return replace(read(number, record), desired=_JUDGEMENTS[spelled])
