"""Conversations through a tokenizer's chat template: what precedes each answer, and the answer.

A template is a program of the model's authors. It may refuse a conversation, leave texts out, or put earlier turns
otherwise once a conversation goes on. Each of these is told from what it writes, and is an error that names the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

from diablo.data.faults import OPENS_WITH_ANSWER, RowError, RowFault
from diablo.errors import UserError, first_line, shortened

Message = dict[str, str]
"""A turn: its ``role`` and its ``content``."""

# Texts that no template writes of itself, and that no change between capitals and small letters alters.
_QUESTION, _ANSWER = "7391058264", "5820461937"


class ChatTemplate:
    """A tokenizer's chat template.

    Some templates read a turn's content as text; those of models that also see images may read a list of parts, and
    find nothing in a text. Which form it reads is found by rendering a question and an answer in both.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Raises:
        UserError: the template is no valid Jinja.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._in_parts = not self._reads(in_parts=False) and self._reads(in_parts=True)

    def turns(self, number: int, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """What precedes each assistant's turn since the one before, and the turn: joined they are the conversation.

        Args:
            number: where the row stands in its file.
            messages: the conversation; every assistant's turn is trained on.

        Raises:
            RowError: the template refuses the conversation, or what it writes lacks a text, or an answer cannot be told
                from what precedes it.
        """
        rendered, first = "", 0
        turns = []
        for index, before, after in self._answers(number, messages):
            if not before.startswith(rendered):
                raise _refused(
                    number,
                    "the chat template rewrites earlier turns, so that they cannot be told from the completion",
                    "give rows of one question and one answer, or set chat to false",
                )
            if not after.startswith(before):
                raise self._begun_otherwise(number, messages[:index], before)
            context = before[len(rendered) :]
            self._check_context(number, messages[:index], first, context)
            if not _ends_with(before, after, messages[index]["content"]):
                raise _refused(
                    number,
                    "the chat template leaves out the answer, or a part of it",
                    "train on text that it keeps, or set chat to false",
                )
            turns.append((context, after[len(before) :]))
            rendered, first = after, index + 1
        return turns

    def prompt(self, number: int, messages: Sequence[Message]) -> list[str]:
        """What precedes an answer that is to come, cut where :meth:`turns` cuts it.

        Earlier answers may be rewritten here, as templates of reasoning models do when they leave out what was thought:
        that is what the model is to see. Such a conversation is in one piece from there on.

        Args:
            number: where the row stands in its file.
            messages: the conversation up to the answer.

        Raises:
            RowError: the template refuses the conversation, or leaves out what the user or the system says.
        """
        whole = self._render(number, messages, add_generation_prompt=True)
        self._check_context(number, messages, 0, whole)
        pieces, rendered = list[str](), ""
        for _, before, after in self._answers(number, messages):
            if not (before.startswith(rendered) and after.startswith(before) and whole.startswith(after)):
                break
            pieces += [before[len(rendered) :], after[len(before) :]]
            rendered = after
        return [*pieces, whole[len(rendered) :]]

    def _answers(self, number: int, messages: Sequence[Message]) -> Iterator[tuple[int, str, str]]:
        """Each assistant's turn: its index, the text that asks for it, and the text with it."""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(number, messages[:index], add_generation_prompt=True)
                yield index, before, self._render(number, messages[: index + 1])

    def _check_context(self, number: int, messages: Sequence[Message], first: int, context: str) -> None:
        """The texts of what is said before an answer must be there, from the message at ``first`` on."""
        found = _squeezed(context)
        for index, message in enumerate(messages[first:], start=first):
            if message["role"] == "assistant" or _squeezed(message["content"]) in found:
                continue
            if not self._has_place(number, messages, index):
                raise _refused(
                    number,
                    f"the chat template leaves out the text of the {message['role']}",
                    "say it in a turn that the template keeps, or set chat to false",
                )

    def _has_place(self, number: int, messages: Sequence[Message], index: int) -> bool:
        """Whether a turn's text comes through at all: templates rewrite some, such as switches in a system's text."""
        probe = [*messages[:index], messages[index] | {"content": _QUESTION}, *messages[index + 1 :]]
        return _QUESTION in self._render(number, probe, add_generation_prompt=True)

    def _begun_otherwise(self, number: int, messages: Sequence[Message], before: str) -> RowError:
        """The error of a template that asks for an answer in other words than it begins one with."""
        asked = before.removeprefix(self._render(number, messages))
        return _refused(
            number,
            f"the chat template asks for an answer with {shortened(asked)} and then begins it otherwise, so that the "
            "answer cannot be told from the prompt",
            "begin the answer so, or set chat to false",
        )

    def _render(self, number: int, messages: Sequence[Message], **options: bool) -> str:
        if not messages:
            raise _refused(number, *OPENS_WITH_ANSWER)
        try:
            return self._apply(messages, in_parts=self._in_parts, **options)
        except Exception as error:  # what a template's own code can raise is open-ended
            says = first_line(error)
            # What a template raises itself is a sentence for its users; anything else is a fault within it.
            meant = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
            how = f"refuses it and says {shortened(says)}" if meant else f"fails on it ({shortened(says)})"
            raise _refused(
                number, f"the chat template {how}", "give turns that it takes, or set chat to false"
            ) from error

    def _apply(self, messages: Sequence[Message], *, in_parts: bool, **options: bool) -> str:
        turns: list[dict[str, Any]] = list(messages)
        if in_parts:
            turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        return self._tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def _reads(self, *, in_parts: bool) -> bool:
        """Whether the template writes what is said in a form."""
        probe = ({"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER})
        try:
            text = self._apply(probe, in_parts=in_parts)
        except TemplateSyntaxError as error:
            raise UserError(
                f"chat: found true; the tokenizer's chat template is no valid Jinja (line {error.lineno}: "
                f"{first_line(error)}): mend it, or set chat to false."
            ) from None
        except Exception:  # it may read another form, and where it reads none each row says what is wrong
            return False
        # A template that reads text may write a list of parts as Python or JSON has it, keys and all.
        is_listing = in_parts and re.search(r"""["']type["']""", text)
        return _QUESTION in text and _ANSWER in text and not is_listing


def _squeezed(text: str) -> str:
    """The text without white space: templates trim texts and set them apart."""
    return "".join(text.split())


def _ends_with(before: str, after: str, answer: str) -> bool:
    """Whether an answer is in what follows the text that asks for it, which may have the answer's first words."""
    sought = _squeezed(answer)
    start = _squeezed(after).rfind(sought)
    return start >= 0 and start + len(sought) > len(_squeezed(before))


def _refused(number: int, reason: str, mend: str) -> RowError:
    return RowError(RowFault(number, reason, mend))
