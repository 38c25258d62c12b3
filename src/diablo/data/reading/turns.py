"""Conversations of files, in the ways of OpenAI, TRL and ShareGPT, to turns with the keys that templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diablo.data.faults import OPENS_WITH_ANSWER, NoRowError
from diablo.data.images import PLACE
from diablo.data.reading.images import part_image
from diablo.data.rows import MEND_UNICODE, Turn, is_unicode, kind_of
from diablo.errors import shortened

_A_TURN = '{"role": "user", "content": "..."}'
_ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_EMPTY = ("an assistant's turn is empty", "give the text that is to be trained on")


def read_conversation(key: str, value: Any) -> tuple[Turn, ...]:
    """The turns of a whole conversation: it begins with another turn than the assistant's, and ends with that.

    Args:
        key: where the row has the conversation, for messages.
        value: what the row has there.

    Raises:
        NoRowError: it is no such conversation, or none of its turns is trained on.
    """
    turns = read_turns(key, value)
    if turns[-1]["role"] != "assistant":
        raise NoRowError("does not end with an assistant's turn", "put the answer at its end")
    if turns[0]["role"] == "assistant":
        raise NoRowError(*OPENS_WITH_ANSWER)
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in turns):
        raise NoRowError("no turn is trained on", "leave out train: false or weight: 0 of an assistant's turn")
    return turns


def read_turns(key: str, value: Any) -> tuple[Turn, ...]:
    """A list of turns, or a text that is one in JSON, see :func:`read_conversation`."""
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise NoRowError(f"{key} is not a list of turns", f"give turns such as {_A_TURN}")
    return tuple(_read_turn(turn) for turn in value)


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools of a row: a list of JSON schemas, or a text that is one in JSON; none where it is null.

    Raises:
        NoRowError: it is something else.
    """
    tools = parsed(value)
    if tools is None or tools == "":
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise NoRowError(
            f"tools is {kind_of(tools)}, not a list of JSON schemas",
            "give a list of objects, or the same as a text in JSON",
        )
    _check_unicode("tools", tools)
    return tuple(tools)


def parsed(value: Any) -> Any:
    """A value that stands in a file as text in JSON; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise NoRowError("a turn has no content that is text", f"give turns such as {_A_TURN}")
    # Tables have every key in every turn, with null where it was not given.
    turn = {key: value for key, value in turn.items() if value is not None}
    named = turn.get("role", turn.get("from"))
    content, images = _content(turn.get("content", turn.get("value")))
    calls = turn.get("tool_calls")
    if named == "function_call":
        calls, content = _calls_of(content), ""
    if content is None and not calls:
        raise NoRowError("a turn has no content that is text", f"give turns such as {_A_TURN}")
    role = _ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        sharegpt = ", ".join(name for name, meant in _ROLES.items() if name != meant)
        raise NoRowError(
            f"a turn has the role {shortened(named)}",
            f"allowed: system, user, assistant, tool, and ShareGPT's names {sharegpt}",
        )
    if role == "assistant" and not (content or "").strip() and not calls:
        raise NoRowError(*_EMPTY)
    result: Turn = {"role": role, "content": content or ""}
    if images:
        if role not in ("user", "tool"):
            raise NoRowError(f"a turn of the {role} has an image", "put it into a turn of the user")
        result["images"] = images
    for key in ("reasoning_content", "tool_call_id", "name"):
        if key in turn:
            if not isinstance(turn[key], str):
                raise NoRowError(f"{key} of a turn is {kind_of(turn[key])}, not text", "give one text")
            result[key] = turn[key]
    if calls:
        result["tool_calls"] = _tool_calls(calls)
    _check_unicode("a turn", {key: value for key, value in result.items() if key != "images"})
    if not _is_trained(role, turn):
        result["train"] = False
    return result


def _content(value: Any) -> tuple[str | None, tuple[Any, ...]]:
    """The text of a turn, which may be in parts, and what it says of its images; None where there is no text."""
    if not isinstance(value, list):
        return (value if isinstance(value, str) else None), ()
    texts, images = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            images.append(part_image(part))
            texts.append(PLACE)
            continue
        if kind != "text" or not isinstance(part.get("text"), str):
            found = f"of the type {shortened(kind)}" if kind != "text" else "without a text"
            raise NoRowError(
                f"a turn has a part {found}", 'give parts such as {"type": "text", "text": "..."}, or of the type image'
            )
        texts.append(part["text"])
    return "".join(texts), tuple(images)


def _is_trained(role: str, turn: Mapping[str, Any]) -> bool:
    """Whether a turn is trained on, by its ``train`` or ``weight``; only an assistant's turn is."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise NoRowError(f"train of a turn is {shortened(train)}", "give true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise NoRowError(f"weight of a turn is {shortened(weight)}", "give 0 or 1: a turn is trained on or not")
    says = {value for value in (train, None if weight is None else bool(weight)) if value is not None}
    if len(says) > 1:
        raise NoRowError("train and weight of a turn contradict each other", "give one of them")
    if role != "assistant":
        if True in says:
            raise NoRowError(f"asks to train on a turn of the {role}", "ask so of an assistant's turn alone")
        return True
    return False not in says


def _calls_of(content: str | None) -> Any:
    """The calls that a ``function_call`` of ShareGPT's data spells."""
    calls = parsed(content)
    return [calls] if isinstance(calls, dict) else calls


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """Calls of tools with their arguments as objects, which templates write as JSON themselves."""
    result = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        named = function if isinstance(function, dict) else {}
        arguments = parsed(named.get("arguments", {}))
        if not isinstance(named.get("name"), str) or not isinstance(arguments, dict):
            raise NoRowError(
                "a call of a tool has no name, or arguments that are no object",
                'give calls such as {"function": {"name": "...", "arguments": {...}}}',
            )
        outer: dict[str, Any] = call if isinstance(call, dict) and "function" in call else {}
        result.append({**outer, "type": "function", "function": {**named, "arguments": arguments}})
    return result


def _check_unicode(what: str, value: Any) -> None:
    if not is_unicode(json.dumps(value, ensure_ascii=False, default=str)):
        raise NoRowError(f"{what} is not valid Unicode", MEND_UNICODE)
