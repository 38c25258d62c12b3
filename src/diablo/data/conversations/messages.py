"""What a conversation's messages hold, apart from any template: reasoning, tool calls and texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
"""A turn: its ``role`` and ``content``, and what it may have besides.

An assistant's turn may have ``reasoning_content`` (text), ``tool_calls`` (a list), and ``train``, which is False where
the turn carries no loss. A tool's turn may have ``name`` and ``tool_call_id``.
"""

OPEN_THINK, CLOSE_THINK = "<think>", "</think>"


def text_of(message: Message) -> str:
    """What a turn says; empty where it has no text, as a turn that only calls a tool may."""
    return message.get("content") or ""


def is_trained(message: Message) -> bool:
    """Whether a turn is an answer that carries loss."""
    return message["role"] == "assistant" and message.get("train", True)


def cut_reasoning(message: Message) -> tuple[str, str]:
    """The reasoning of an assistant's turn, and its answer.

    The reasoning is what ``reasoning_content`` holds, or stands in ``<think>`` tags at the start of the content.

    Returns:
        The two texts as they stand there; the reasoning is empty where there is none.
    """
    content = text_of(message)
    if message["role"] != "assistant":
        return "", content
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    opened, tag, rest = content.partition(OPEN_THINK)
    reasoning, closing, answer = rest.partition(CLOSE_THINK)
    return (reasoning, answer) if tag and closing and not opened.strip() else ("", content)


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The functions that a turn calls, each a dict of ``name`` and ``arguments``, which are a dict where they parse.

    Calls are read as OpenAI's interface writes them (``{"type": "function", "function": {...}}``, the arguments a JSON
    text) and without that wrapping.
    """
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            # A template may take as it is what is no JSON.
            with suppress(ValueError):
                arguments = json.loads(arguments)
        calls.append({"name": function.get("name", ""), "arguments": arguments})
    return calls


def with_calls(message: Message, *, as_text: bool) -> list[dict[str, Any]]:
    """The tool calls of a turn in the form that templates read, the arguments as a dict or as JSON text."""
    whole = []
    for call, function in zip(message["tool_calls"], calls_of(message), strict=True):
        if as_text and not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        whole.append({"type": "function"} | {key: call[key] for key in ("id",) if key in call} | {"function": function})
    return whole


def join_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with the system's text at the start of the first question; as it is where it has none."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    system, user, *rest = messages
    return [user | {"content": f"{text_of(system)}\n\n{text_of(user)}"}, *rest]


def map_texts(message: Message, change: Callable[[str], str]) -> Message:
    """A turn with each of its texts changed; the tags around reasoning stay."""
    reasoning, answer = cut_reasoning(message)
    changed = dict(message)
    if "content" in message:
        changed["content"] = change(answer)
        if reasoning and not message.get("reasoning_content"):
            changed["content"] = f"{OPEN_THINK}{change(reasoning)}{CLOSE_THINK}{change(answer)}"
    if message.get("reasoning_content"):
        changed["reasoning_content"] = change(reasoning)
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            {key: given[key] for key in ("id",) if key in given} | {"function": map_values(call, change)}
            for given, call in zip(message["tool_calls"], calls_of(message), strict=True)
        ]
    return changed


def map_values(value: Any, change: Callable[[str], str]) -> Any:
    """A value as JSON has them, with each text that is a value changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_values(inner, change) for key, inner in value.items()}
    return [map_values(inner, change) for inner in value] if isinstance(value, (list, tuple)) else value


def texts_of(message: Message) -> Iterator[str]:
    """The texts of a turn that are trained on or come before."""
    found: list[str] = []
    map_texts(message, lambda text: found.append(text) or text)
    yield from found
