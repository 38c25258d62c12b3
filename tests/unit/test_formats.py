"""Records to rows: the formats that people's data has, the turns of conversations, and columns by name and template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diablo.data.faults import NoRowError
from diablo.data.reading.columns import Columns
from diablo.data.reading.formats import to_row
from diablo.data.rows import Row
from diablo.errors import UserError

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def fault_of(record: Any) -> str:
    with pytest.raises(NoRowError) as caught:
        to_row(1, record)
    return f"{caught.value.reason}; {caught.value.mend}"


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": [ASKED, ANSWERED], "text": "x", "prompt": "x"}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, "ShareGPT"),
        ({"prompt": "hi", "completion": "ho"}, "prompt/completion"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "prompt/completion"),
        ({"instruction": "hi", "output": "ho", "text": "both"}, "Alpaca"),
        ({"text": "hi"}, "text"),
        # A table with records of several formats has the columns of all.
        ({"messages": None, "prompt": "hi", "completion": "ho", "text": None}, "prompt/completion"),
    ],
)
def test_the_format_is_told_by_the_columns(record: dict[str, Any], form: str) -> None:
    assert to_row(7, record)[1] == form
    assert to_row(7, record)[0].number == 7


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("human", "gpt"), ("from", "value")),
        (("user", "assistant"), ("role", "content")),
        (("user", "chatgpt"), ("from", "value")),
        (("human", "bing"), ("role", "value")),
        (("human", "bard"), ("from", "content")),
    ],
)
def test_roles_of_sharegpt(names: tuple[str, str], keys: tuple[str, str]) -> None:
    said = [("system", "be brief"), (names[0], "hi"), (names[1], "ho")]
    turns = [dict(zip(keys, turn, strict=True)) for turn in said]
    row, _ = to_row(1, {"conversations": turns})
    assert row.messages == ({"role": "system", "content": "be brief"}, ASKED, ANSWERED)


def test_calls_of_tools_in_sharegpt_are_those_of_messages() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    sharegpt = [
        {"from": "human", "value": "1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ]
    flat = {"name": "add", "arguments": {"a": 1}}
    # OpenAI's data has arguments as text in JSON.
    openai = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    end = [{"role": "tool", "content": "2", "tool_call_id": "x"}, {"role": "assistant", "content": "It is 2."}]
    expected = ("1?", "", "2", "It is 2.")
    row, _ = to_row(1, {"conversations": sharegpt, "tools": json.dumps(tools)})
    assert row.tools == tuple(tools)
    assert tuple(turn["content"] for turn in row.messages) == expected
    assert [turn["role"] for turn in row.messages] == ["user", "assistant", "tool", "assistant"]
    assert row.messages[1]["tool_calls"] == [CALL]
    for call, kept in ((CALL, CALL), (flat, CALL), (openai, CALL | {"id": "x"})):
        turns = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": None, "tool_calls": [call]}, *end]
        row, _ = to_row(1, {"messages": turns, "tools": tools})
        assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": [kept]}
        assert row.messages[2]["tool_call_id"] == "x"
        assert row.tools == tuple(tools)


def test_a_turn_keeps_what_templates_read_and_whether_it_is_trained_on() -> None:
    first = {"role": "assistant", "content": "a", "reasoning_content": "hm", "name": "Bo", "seen": 3, "train": False}
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    second = {"role": "assistant", "content": "b", "weight": 1, "tool_calls": None}
    row, _ = to_row(1, {"messages": [ASKED, first, {"role": "user", "content": parts}, second]})
    assert row.messages == (
        ASKED,
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "name": "Bo", "train": False},
        {"role": "user", "content": "What now?"},
        {"role": "assistant", "content": "b"},
    )
    row, _ = to_row(1, {"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED | {"train": False}, ANSWERED]})
    assert [turn.get("train", True) for turn in row.messages] == [True, False, True, True]


def test_the_assistants_turns_of_a_prompt_are_not_trained_on() -> None:
    row, _ = to_row(1, {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED], "tools": None})
    assert row.messages == (ASKED, ANSWERED | {"train": False}, ASKED, ANSWERED)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([ASKED, ANSWERED | {"weight": 0.5}], "weight of a turn is 0.5; give 0 or 1"),
        ([ASKED, ANSWERED | {"train": "no"}], "train of a turn is 'no'; give true or false"),
        ([ASKED, ANSWERED | {"train": True, "weight": 0}], "train and weight of a turn contradict each other"),
        ([ASKED, ANSWERED | {"weight": 0}], "no turn is trained on; leave out train: false or weight: 0"),
        ([ASKED | {"weight": 1}, ANSWERED], "asks to train on a turn of the user"),
        ([ASKED | {"content": [{"type": "audio"}]}, ANSWERED], "a turn has a part of the type 'audio'"),
        ([ASKED | {"content": [{"type": "text"}]}, ANSWERED], "a turn has a part without a text"),
        ([ASKED, ANSWERED | {"reasoning_content": 3}], "reasoning_content of a turn is a number, not text"),
        ([ASKED, ANSWERED | {"tool_calls": "add"}], "a call of a tool has no name, or arguments that are no object"),
        ([ASKED, ANSWERED | {"tool_calls": [{"name": "a", "arguments": "b"}]}], "a call of a tool has no name, or"),
        ([ASKED, {"role": "assistant", "content": None}], "a turn has no content that is text"),
        ([ASKED, ANSWERED | {"role": "bot"}], "a turn has the role 'bot'; allowed: system, user, assistant, tool, and"),
    ],
)
def test_faults_of_turns(turns: list[Any], reason: str) -> None:
    assert fault_of({"messages": turns}).startswith(reason)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"question": "a", "answer": "b", "id": 3},
            "has question, answer, id; needs prompt and completion, messages, conversations, instruction and output, "
            "or text; or say which columns these are with data.columns: {prompt: question, completion: answer}",
        ),
        ({"prompt": "a", "response": "b"}, "completion is missing, not text; give it; or say which columns these are"),
        ({"words": "b"}, "has words; needs prompt and completion"),
        ({"prompt": "a", "completion": "b", "tools": [{}]}, "has tools and a prompt that is text"),
        ({"messages": [ASKED, ANSWERED], "tools": "add"}, "tools is text, not a list of JSON schemas"),
        ({"messages": [ASKED, ANSWERED], "tools": [3]}, "tools is a list, not a list of JSON schemas"),
        ({"prompt": [ASKED], "completion": "b"}, "prompt is a list, not text"),
    ],
)
def test_faults_of_records(record: dict[str, Any], reason: str) -> None:
    assert fault_of(record).startswith(reason)


def test_columns_by_name_and_by_template() -> None:
    columns = Columns({"prompt": "my question", "completion": "{{ why }}\n#### {{ row['the answer'] }} {{ sure }}\n"})
    record = {"my question": 3, "why": "hm", "the answer": 4.5, "sure": True, "prompt": "other"}
    row, form = to_row(1, columns(record))
    assert (row, form) == (Row(1, "3", "hm\n#### 4.5 true\n"), "prompt/completion")
    chats = Columns({"conversations": "chat", "tools": "functions"})
    made = chats({"chat": [ASKED, ANSWERED], "functions": "[]", "messages": 3})
    assert made == {"conversations": [ASKED, ANSWERED], "tools": "[]"}


@pytest.mark.parametrize(
    ("completion", "record", "reason"),
    [
        ("answer", {"question": "a", "id": 3}, "has no column 'answer'; it has question, id"),
        ("{{ answer }}", {"question": "a"}, "columns: the template of completion says \"'answer' is undefined\""),
        ("{{ answer }}", {"question": "a", "answer": None}, "columns: a template prints a null; say what stands"),
        ("{{ answer + 1 }}", {"question": "a", "answer": "b"}, "columns: the template of completion fails"),
        ("{{ answer.__class__.mro() }}", {"question": "a", "answer": "b"}, "columns: the template of completion says"),
        ("{% for i in range(10**9) %}x{% endfor %}", {"question": "a"}, "columns: the template of completion fails"),
    ],
)
def test_faults_of_columns(completion: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoRowError) as caught:
        Columns({"prompt": "question", "completion": completion})(record)
    assert f"{caught.value.reason}; {caught.value.mend}".startswith(reason)


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        (
            {"prompt": "a"},
            "columns: found prompt; give those of one format: messages, with or without tools, images, image;",
        ),
        ({"prompt": "a", "completion": "b", "text": "c"}, "columns: found prompt, completion, text; give those of one"),
        ({}, "columns: found none"),
        (
            {"promt": "a", "completion": "b"},
            r"columns: found 'promt' as a column of a format; .* Did you mean prompt\?",
        ),
        ({"text": "{{ a"}, "columns: found '{{ a' for text, which is no valid Jinja"),
    ],
)
def test_columns_that_make_no_format(mapping: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Columns(mapping)
