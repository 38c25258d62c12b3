"""A row: what is trained on, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diablo.data.images import Image

MEND_UNICODE = "it has half of a surrogate pair, so write the character itself"
"""What to do about text that :func:`is_unicode` refuses."""

Turn = dict[str, Any]
"""A turn of a conversation: ``role`` and ``content``, both text, and optionally ``reasoning_content`` (text),
``tool_calls`` (a list of objects whose arguments are objects), ``tool_call_id`` and ``name`` (text). An assistant's
turn that is not trained on has ``train``, which is False. A turn of the user or of a tool may have ``images``, one for
each :data:`diablo.data.images.PLACE` in its content."""


RowKind = Literal["completions", "pairs", "judged", "prompts", "labelled", "numbered", "tagged", "texts"]
"""What rows are: completions that are learned; pairs of a better and a worse completion of one prompt; completions of
which each is judged good or bad; prompts, which the model completes while it is trained; texts with a label, or with a
number; words of which each has a label; or texts that belong together, or do not."""


@dataclass(frozen=True)
class Row:
    """A row to train on: a prompt and its completion, or a conversation, or a document.

    Attributes:
        number: where the row stands in its file: line of a .jsonl, .csv or .tsv, position in others, from 1.
        prompt: text before the completion; empty where ``messages`` or ``text`` is given.
        completion: text that is trained on; empty where ``messages`` or ``text`` is given.
        messages: a conversation whose assistant turns are trained on, aside from those that say otherwise.
        user: what the user says where the prompt is put as a conversation, if that is not the prompt itself.
        tools: JSON schemas of the tools that the conversation may call.
        text: a document whose every token is trained on.
        source: the name of the file or dataset that the row is from; empty where there is only one.
        rejected: the same prompt with a worse completion, where the row is a pair.
        desired: whether the completion is a good one, where the row is judged; None where it is not.
        columns: what else the record of a prompt has, for the rewards of its completions.
        text_pair: a second text beside ``prompt``, where two texts have one label; empty where there is one.
        label: what the text in ``prompt`` is labelled with: a label, several of them, or a number; or the labels of
            ``words``. None where nothing is labelled.
        words: the words of a text of which each has a label.
        others: the texts that the one in ``prompt`` is compared with: one that belongs to it, and then those that do
            not; or one alone, where ``label`` says how near the two are. Empty where nothing is compared.
    """

    number: int
    prompt: str = ""
    completion: str = ""
    messages: tuple[Turn, ...] = ()
    user: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    source: str = ""
    rejected: Row | None = None
    desired: bool | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    text_pair: str = ""
    label: str | float | tuple[str, ...] | None = None
    words: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """What is asked: the prompt, or the only turn before a conversation's answer; empty where there are more."""
        if len(self.messages) == 2 and self.messages[0]["role"] == "user":
            return self.messages[0]["content"]
        return "" if self.messages else self.prompt

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all turns, in their order."""
        return tuple(image for turn in self.messages for image in turn.get("images", ()))

    def as_messages(self) -> tuple[Turn, ...]:
        """The row as a conversation: a prompt becomes the user's turn, its completion the assistant's."""
        return self.messages or (
            {"role": "user", "content": (self.user or self.prompt).strip()},
            {"role": "assistant", "content": self.completion.strip()},
        )


def instruction_row(number: int, instruction: str, output: str, context: str = "") -> Row:
    """A row of an instruction, optionally what it is about, and the response, as Alpaca's data has them."""
    sections = [
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{context}"] if context else []),
        "### Response:\n",
    ]
    user = f"{instruction}\n\n{context}" if context else instruction
    return Row(number, "\n\n".join(sections), output, user=user)


def is_unicode(text: str) -> bool:
    """Whether a tokenizer takes the text: JSON can spell half of a surrogate pair, which is none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def describe_value(record: Mapping[str, Any], key: str) -> str:
    """What a record has at a key, for a message about its being something else."""
    return kind_of(record[key]) if key in record else "missing"


def kind_of(value: Any) -> str:
    """What a value is in the words of JSON, with an article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
