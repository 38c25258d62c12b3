"""Chat templates of every kind that models bring: none of them loses a text of a row in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from diablo.data.encoding import IGNORED, RowEncoder
from diablo.data.faults import RowError
from diablo.data.rows import Row
from diablo.errors import UserError

# As templates of models that see images are: a text that is no list of parts is looped over to no effect.
OF_PARTS = (
    "{% for m in messages %}<s>{{ m['role'] | capitalize }}:{{ '' if m['content'][0]['type'] == 'image' else ' ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>Assistant:{% endif %}"
)
# Some read the first part only, and fail on a text.
OF_A_FIRST_PART = OF_PARTS.replace(
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
    "{{ '' + m['content'][0]['text'] }}",
)
TURN = "<s>{{ m['role'] }}\n{{ text }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
# Reasoning is kept in the answer that comes last, as many models have it.
REASONING = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if not loop.last and '</think>' in text %}{% set text = text.split('</think>')[-1] | trim %}{% endif %}" + TURN
)
NO_REASONING = REASONING.replace("not loop.last and ", "")
TURN_OF_TEXT = "{% for m in messages %}{% set text = m['content'] %}" + TURN


def talk(*contents: str, system: str = "") -> Row:
    """A conversation of questions and answers in turn."""
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Row(4, messages=(*first, *turns))


def asked_of_tools() -> Row:
    """A question that is answered with the help of a tool."""
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = (
        {"role": "user", "content": "how is Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "12 degrees"},
        {"role": "assistant", "content": "mild"},
    )
    parameters = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
    function = {"name": "weather", "description": "the weather", "parameters": parameters | {"required": ["city"]}}
    return Row(4, messages=turns, tools=({"type": "function", "function": function},))


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def encoder_of(tokenizer: Any, template: str) -> RowEncoder:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return RowEncoder(tokenizer, chat=True)


def answers(encoder: RowEncoder, row: Row) -> str:
    return encoder.tokenizer.decode([label for label in encoder.encode(row).labels if label != IGNORED])


@pytest.mark.parametrize("template", [OF_PARTS, OF_A_FIRST_PART])
def test_a_template_of_parts_is_given_parts(shared_tokenizer: Any, template: str) -> None:
    encoder = encoder_of(shared_tokenizer, template)
    encoded = encoder.encode(talk("one?", "first", "two?", "second", system="be brief"))
    assert encoder.tokenizer.decode(encoded.input_ids) == (
        "<s>System: be brief</s>\n<s>User: one?</s>\n<s>Assistant: first</s>\n<s>User: two?</s>\n<s>Assistant: second"
        "</s>"
    )
    assert answers(encoder, talk("one?", "first", "two?", "second")) == " first</s> second</s>"
    assert answers(encoder, Row(1, "one?", "first")) == " first</s>"
    assert encoder.tokenizer.decode(encoder.prompt(talk("one?", "?"))) == "<s>User: one?</s>\n<s>Assistant:"


def test_a_template_that_reads_both_forms_is_given_text(shared_tokenizer: Any) -> None:
    template = "{% for m in messages %}{% set text = m['content'] ~ (' as text' if m['content'] is string else '') %}"
    assert answers(encoder_of(shared_tokenizer, template + TURN), talk("one?", "first")) == "first as text</s>"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        ("{% for m in messages %}{% set text = '' %}" + TURN, talk("one?", "first"), "leaves out the text of the user"),
        (
            "{% for m in messages %}{% set text = m['content'] if m['role'] == 'assistant' else '' %}" + TURN,
            talk("one?", "first"),
            "leaves out the text of the user",
        ),
        (
            "{% for m in messages %}{% set text = m['content'] if m['role'] == 'user' else '' %}" + TURN,
            talk("one?", "first"),
            "leaves out the answer, or a part of it",
        ),
        # The words stand in the question, and in what the template writes around the answer: neither is the answer.
        (
            "{% for m in messages %}{% set text = m['content'] if m['role'] == 'user' else '' %}" + TURN,
            talk("say user", "user"),
            "leaves out the answer",
        ),
        (
            "{% for m in messages %}{% set text = m['content'][:9] %}" + TURN,
            talk("one?", "first " * 9),
            "leaves out the answer",
        ),
        (
            "{% for m in messages if m['role'] != 'system' %}{% set text = m['content'] %}" + TURN,
            talk("one?", "first", system="be brief"),
            "leaves out the text of the system",
        ),
        (NO_REASONING, talk("one?", "<think>\nhm\n</think>\n\nfirst"), "leaves out the reasoning of an answer"),
        (TURN_OF_TEXT, asked_of_tools(), "leaves out the tool 'weather'"),
        (TURN_OF_TEXT, Row(4, messages=asked_of_tools().messages), "leaves out a tool call"),
    ],
)
def test_a_text_that_does_not_come_back_names_the_row(
    shared_tokenizer: Any, template: str, row: Row, reason: str
) -> None:
    with pytest.raises(RowError, match=f"^Row 4: the chat template {reason}") as caught:
        encoder_of(shared_tokenizer, template).encode(row)
    assert "set chat to false" in caught.value.fault.mend or "chat_template" in caught.value.fault.mend


def test_generation_does_not_lose_a_question_either(shared_tokenizer: Any) -> None:
    encoder = encoder_of(shared_tokenizer, "{% for m in messages %}{% set text = '' %}" + TURN)
    with pytest.raises(UserError, match="Row 4: the chat template leaves out the text of the user"):
        encoder.prompt(talk("one?", "?"))


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        # A system's text that is put into the user's turn, as Gemma's and Mistral's templates do.
        (
            "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
            "{% for m in messages if m['role'] != 'system' %}"
            "{% set text = (first if loop.first else '') + m['content'] %}" + TURN,
            "<s>user\nbe brief /no_think\n\none?</s>\n<s>assistant\n",
        ),
        # Switches in a system's text that the template reads and takes out.
        (
            "{% for m in messages %}{% set text = m['content'] | replace(' /no_think', '') | trim %}" + TURN,
            "<s>system\nbe brief</s>\n<s>user\none?</s>\n<s>assistant\n",
        ),
        ("{% for m in messages %}{% set text = m['content'] | tojson %}" + TURN, None),
    ],
)
def test_a_text_that_is_put_otherwise_is_not_lost(shared_tokenizer: Any, template: str, prompt: str | None) -> None:
    encoder = encoder_of(shared_tokenizer, template)
    row = talk("one?", "first", system="be brief /no_think")
    assert "first" in answers(encoder, row)
    assert prompt in (None, encoder.tokenizer.decode(encoder.prompt(row)))


def test_reasoning_of_the_answer_is_trained_on(shared_tokenizer: Any) -> None:
    encoder = encoder_of(shared_tokenizer, REASONING)
    answer = "<think>\nhm\n</think>\n\nfirst"
    assert answers(encoder, talk("one?", answer)) == f"{answer}</s>"
    # Where the prompt has the first of it, as models do that always think, the rest is what is learned.
    asking = REASONING.replace("<s>assistant\n{% endif %}", "<s>assistant\n<think>\n{% endif %}")
    assert answers(encoder_of(shared_tokenizer, asking), talk("one?", answer)) == "hm\n</think>\n\nfirst</s>"


def test_a_conversation_goes_on_where_earlier_reasoning_is_left_out(shared_tokenizer: Any) -> None:
    encoder = encoder_of(shared_tokenizer, REASONING)
    row = talk("one?", "<think>\nhm\n</think>\n\nfirst", "two?", "?")
    assert encoder.tokenizer.decode(encoder.prompt(row)) == (
        "<s>user\none?</s>\n<s>assistant\nfirst</s>\n<s>user\ntwo?</s>\n<s>assistant\n"
    )
    assert answers(encoder, row) == "?</s>"
    assert len(encoder.encode_all(row)) == 2


def test_a_template_that_begins_an_answer_otherwise_than_it_asks_for_one_shows_how(shared_tokenizer: Any) -> None:
    asking = REASONING.replace("<s>assistant\n{% endif %}", "<s>assistant\n<think>\n{% endif %}")
    with pytest.raises(UserError) as caught:
        encoder_of(shared_tokenizer, asking).encode(talk("one?", "first"))
    assert str(caught.value) == (
        r"Row 4: the chat template asks for an answer with '<s>assistant\n<think>\n' and then begins it otherwise, so "
        "that the answer cannot be told from the prompt; give the answer's reasoning, as reasoning_content or in "
        "<think> tags before it, give another chat_template, or set chat to false."
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise_exception('Roles must alternate')", "refuses it and says 'Roles must alternate'"),
        ("nothing.at.all", "fails on it"),
        ("1 // 0", "fails on it"),
        ("'a'.no_such_method()", "fails on it"),
        ("[].pop()", "refuses it"),  # Jinja's sandbox says so itself
    ],
)
def test_whatever_a_template_raises_names_the_row(shared_tokenizer: Any, fault: str, reason: str) -> None:
    switch = f"{{% if messages[0]['content'] == 'be brief' %}}{{{{ {fault} }}}}{{% endif %}}"
    encoder = encoder_of(shared_tokenizer, switch + shared_tokenizer.chat_template)
    encoder.encode(talk("one?", "first"))
    with pytest.raises(RowError, match=f"^Row 4: the chat template {reason}.*set chat to false"):
        encoder.encode(talk("one?", "first", system="be brief"))


def test_a_template_that_is_no_jinja_is_refused_before_any_row(shared_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"chat: found true; .* is no valid Jinja \(line 2: .*set chat to false"):
        encoder_of(shared_tokenizer, "{% for m in messages %}\n{{ m['content'] }")
