"""Every chat template that TRL ships: an answer is trained in the context that generation gives it, token by token.

The folder is read, so that a template which a later TRL brings is tested as well.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from diablo.data.encoding import IGNORED, RowEncoder
from diablo.data.faults import RowError
from diablo.data.rows import Row

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja")) if "_training" not in path.stem}

# What models have as special tokens, with which templates set turns apart.
SPECIAL = re.compile(
    r"<[|\uff5c][^<>{}'\"\s]+[|\uff5c]>|<\|?(?:end_of|start_of)?_?(?:turn|utterance|tool_call|tool_response)\|?>"
)
# Tokens that models stop at, as their generation configs say, and that no template writes behind an answer.
STOPS = ("<|user|>", "<|observation|>", "<|call|>", "<|tool_response>")
# What templates have a model write around an answer: to whom it speaks, or that it has not reasoned.
OPENINGS = re.compile(
    r"</?think>|<\|channel\|>final<\|message\|>|<\|(?:START|END)_RESPONSE\|>|<\|turn>model\n|to=user(?:<\|message\|>)?"
)

SYSTEM = {"role": "system", "content": "be brief"}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "tells the weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "where"}},
                "required": ["city"],
            },
        },
    },
)


def question(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f"question {number}?"}


def answer(number: int, *, reasoned: bool = False) -> dict[str, Any]:
    return {"role": "assistant", "content": f"answer {number}"} | (
        {"reasoning_content": f"thought {number}"} if reasoned else {}
    )


def talk(turns: int, *, system: bool = False, reasoned: bool = False, tools: bool = False) -> Row:
    messages: list[dict[str, Any]] = [SYSTEM] if system else []
    for number in range(1, turns + 1):
        messages.append(question(number))
        if tools and number == 1:
            function = {"name": "weather", "arguments": {"city": "Oslo"}}
            call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
            messages += [call | ({"reasoning_content": "thought 0"} if reasoned else {})]
            messages += [{"role": "tool", "name": "weather", "content": "12 degrees"}]
        messages.append(answer(number, reasoned=reasoned))
    return Row(7, messages=tuple(messages), tools=TOOLS if tools else ())


# The prompt opens the reasoning, and the template has no form for an answer that has none.
ALWAYS_REASONS = {"deepseek_r1_distill", "deepseekv3"}
# They read no reasoning, or only beside a tool call; or the prompt closes it before the answer.
NO_REASONING = {
    *("cohere", "cohere2", "gemma", "gemma3", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "idefics3", "lfm2"),
    *("lfm2_v2", "llama3", "llama3_1", "llama3_2", "llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl"),
    *("qwen3_5_nothink", "qwen3_instruct_2507", "qwen3_vl", "smolvlm"),
}
# They leave out the tools that are offered, or, as LFM2's first one, the calls.
NO_TOOLS = {
    *("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "idefics3", "lfm2", "llama3"),
    *("llava_next", "phi3", "phi3_5", "qwen2_5_vl", "smolvlm"),
}
KINDS = {
    f"{turns} turns, {', '.join(name for name, is_on in kind.items() if is_on) or 'plain'}": (turns, kind)
    for turns in (1, 3)
    for kind in (
        {"system": system, "reasoned": reasoned, "tools": tools}
        for system in (False, True)
        for reasoned in (False, True)
        for tools in (False, True)
    )
}


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_model: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = {token for template in TEMPLATES.values() for token in SPECIAL.findall(template)} | set(STOPS)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(found)})
    return tokenizer


def cannot(name: str, kind: dict[str, bool]) -> str:
    """Why a template cannot put a conversation, as the row's error says it; empty where it can."""
    if kind["tools"] and name in NO_TOOLS:
        return "leaves out (the tool 'weather'|a tool call|the reasoning)"
    if kind["reasoned"] and name in NO_REASONING:
        return "leaves out the reasoning|begins it otherwise.*take its reasoning out"
    if not kind["reasoned"] and name in ALWAYS_REASONS:
        return "begins it otherwise.*give the answer's reasoning"
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_trained_in_the_context_of_generation(shared_tokenizer: Any, name: str, kind: str) -> None:
    tokenizer = copy.copy(shared_tokenizer)
    tokenizer.chat_template = TEMPLATES[name]
    stops = tokenizer.convert_tokens_to_ids(list(STOPS))
    encoder = RowEncoder(tokenizer, chat=True, stop_token_ids=stops)
    turns, options = KINDS[kind]
    row = talk(turns, **options)
    if reason := cannot(name, options):
        with pytest.raises(RowError, match=f"^Row 7: the chat template .*({reason})"):
            encoder.encode_all(row)
        return
    trained = trained_answers(encoder.encode_all(row))
    answers = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    assert len(trained) == len(answers)
    for index, (context, completion) in zip(answers, trained, strict=True):
        message = row.messages[index]
        assert context == of_generation(tokenizer, row.messages[:index], row.tools)
        # One token ends the turn, at its end, and it is one that stops generation.
        assert [token in encoder.stop_token_ids for token in completion].index(True) == len(completion) - 1
        text = tokenizer.decode(completion[:-1])
        for said in (message["content"], message.get("reasoning_content", "")):
            assert said in text
        if "tool_calls" in message:
            assert re.search("weather.*city.*Oslo", text, re.DOTALL)
        elif not options["reasoned"]:
            assert OPENINGS.sub("", text).strip() == message["content"]
        else:
            # Reasoning comes first, and nothing after the answer.
            assert text.index(message["reasoning_content"]) < text.index(message["content"])
    # What the encoder gives generation for the last answer is the same.
    assert encoder.prompt(row) == trained[-1][0]


def trained_answers(rows: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Each supervised run of tokens, with all tokens before it in its row."""
    found: list[tuple[list[int], list[int]]] = []
    for row in rows:
        start = None
        for index, label in enumerate([*row.labels, IGNORED]):
            assert index == len(row.labels) or label in (IGNORED, row.input_ids[index])
            if label != IGNORED and start is None:
                start = index
            elif label == IGNORED and start is not None:
                found.append((row.input_ids[:start], row.input_ids[start:index]))
                start = None
    return found


def of_generation(tokenizer: Any, messages: tuple[dict[str, Any], ...], tools: Any) -> list[int]:
    """The tokens of a prompt as transformers makes them of messages in the form that the template reads."""
    # gpt-oss reads another name, which older versions of transformers do not give it.
    messages = tuple(
        {"thinking": each["reasoning_content"], **each} if "reasoning_content" in each else each for each in messages
    )
    joined = messages
    if messages[0] is SYSTEM:
        joined = ({"role": "user", "content": f"{SYSTEM['content']}\n\n{messages[1]['content']}"}, *messages[2:])
    of_parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    for form in (messages, of_parts, joined):
        try:
            text = tokenizer.apply_chat_template(
                list(form), tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # it reads another form
            continue
        if messages[-1]["content"] in text:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
    raise AssertionError("no form of the messages is read")
