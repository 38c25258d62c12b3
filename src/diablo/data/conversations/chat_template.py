"""Conversations through a tokenizer's chat template: what precedes each answer, and the answer.

A template is a program of the model's authors. It may refuse a conversation, leave texts out, or put earlier turns
otherwise once a conversation goes on. What precedes an answer is therefore always what the template writes when it is
asked for that answer, which is what generation gives the model. What does not come through is an error that names the
row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError, UndefinedError

from diablo.data.conversations.forms import ANSWER, ANSWERED, QUESTION, TemplateRenderer
from diablo.data.conversations.messages import (
    CLOSE_THINK,
    OPEN_THINK,
    Message,
    calls_of,
    cut_reasoning,
    is_trained,
    text_of,
)
from diablo.data.faults import OPENS_WITH_ANSWER, RowError, RowFault
from diablo.data.images import PLACE
from diablo.errors import first_line, shortened

Tools = Sequence[dict[str, Any]]
"""The tools that a conversation offers, as JSON schemas."""


@dataclass(frozen=True)
class Turn:
    """An answer that is trained on.

    Attributes:
        context: all that precedes it, as generation asks for it.
        answer: what the template writes of it, through the token that ends the turn.
        ends: whether there is such a token.
        images: how many images precede it.
    """

    context: str
    answer: str
    ends: bool
    images: int = 0


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        special_tokens: the texts of its special tokens.
        stops: those of them that stop generation, as far as they are known.

    Attributes:
        end_of_turn: the special token that the template writes right after an answer; None where it writes none.

    Raises:
        UserError: the template is no valid Jinja.
    """

    def __init__(self, tokenizer: Any, *, special_tokens: Iterable[str], stops: Iterable[str]) -> None:
        self._renderer = TemplateRenderer(tokenizer)
        self.end_of_turn = self._find_end_of_turn(special_tokens)
        listed = _any_of({*stops, *([self.end_of_turn] if self.end_of_turn else [])})
        self._closing = re.compile(rf"(?:\s*(?:{listed}))+\s*\Z")
        self._stop = re.compile(listed)

    @property
    def has_no_system(self) -> bool:
        """Whether it refuses a system's turn, so that the text is put before the first question."""
        return self._renderer.forms.no_system

    def turns(self, number: int, messages: Sequence[Message], tools: Tools = ()) -> list[Turn]:
        """The answers that are trained on, each with what precedes it.

        Args:
            number: where the row stands in its file.
            messages: the conversation.
            tools: the tools that it offers.

        Raises:
            RowError: no answer is trained on; or the template refuses the conversation, or what it writes lacks a text,
                or an answer cannot be told from what precedes it.
        """
        turns: list[Turn] = []
        first, said = 0, ""
        for index in (index for index, message in enumerate(messages) if is_trained(message)):
            context = self._render(number, messages[:index], tools, add_generation_prompt=True)
            self._check_context(number, messages[:index], tools, first, context.removeprefix(said))
            answer = self._answer(number, messages[: index + 1], tools, context)
            images = sum(len(message.get("images", ())) for message in messages[:index])
            turns.append(replace(self._ended(messages, index, tools, context, answer), images=images))
            first, said = index + 1, turns[-1].context + turns[-1].answer
        if not turns:
            raise _refused(number, "has no answer that is trained on", "take train: false off a turn")
        return turns

    def prompt(self, number: int, messages: Sequence[Message], tools: Tools = ()) -> str:
        """What precedes an answer that is to come.

        Args:
            number: where the row stands in its file.
            messages: the conversation up to the answer.
            tools: the tools that it offers.

        Raises:
            RowError: the template refuses the conversation, or leaves out what the user or the system says.
        """
        context = self._render(number, messages, tools, add_generation_prompt=True)
        self._check_context(number, messages, tools, 0, context)
        return context

    def _answer(self, number: int, messages: Sequence[Message], tools: Tools, context: str) -> str:
        """All that the template writes of the last message, behind what asks for it."""
        reasoning, said = cut_reasoning(messages[-1])
        text = self._render(number, messages, tools)
        answer = _behind(context, text)
        if answer is None:
            answer = self._behind_rewritten(number, messages, tools, context, text)
        if not _holds(answer or "", reasoning) and context.rstrip().endswith(OPEN_THINK):
            # Asked so, the model reasons, whatever the template does with that later.
            answer = self._reasoned(number, messages, tools, context)
        if answer is None:
            raise self._begun_otherwise(number, messages, tools, context)
        if not _holds(answer, reasoning):
            raise _refused(
                number,
                "the chat template leaves out the reasoning of an answer that is trained on",
                "take the reasoning out, or give a chat_template that keeps it",
            )
        if not _holds(answer, said):
            raise _refused(
                number,
                "the chat template leaves out the answer, or a part of it",
                "train on text that it keeps, or set chat to false",
            )
        for call in calls_of(messages[-1]):
            arguments = call["arguments"] if isinstance(call["arguments"], dict) else {}
            if not all(_holds(answer, sought) for sought in (call["name"], *arguments)):
                raise _refused(
                    number,
                    "the chat template leaves out a tool call, or a part of it",
                    "take a model whose template has tools, or give such a chat_template",
                )
        return answer

    def _behind_rewritten(
        self, number: int, messages: Sequence[Message], tools: Tools, context: str, text: str
    ) -> str | None:
        """The answer, where the template puts what comes before it otherwise as soon as it is there."""
        *earlier, last = messages
        asked = context.removeprefix(self._render(number, earlier, tools))
        other = last | {"content": ANSWER} | ({"reasoning_content": QUESTION} if cut_reasoning(last)[0] else {})
        start = _shared(text, self._render(number, [*earlier, other], tools)).rfind(asked)
        return text[start + len(asked) :] if start >= 0 and 0 < len(asked) < len(context) else None

    def _reasoned(self, number: int, messages: Sequence[Message], tools: Tools, context: str) -> str | None:
        """The answer with its reasoning, where the context has opened that and the template takes it away."""
        *earlier, last = messages
        reasoning, said = cut_reasoning(last)
        bare = {key: value for key, value in last.items() if key != "reasoning_content"} | {"content": ANSWER}
        written = self._render(number, [*earlier, bare], tools)
        opening = context.rstrip().removesuffix(OPEN_THINK)
        answer = _behind(opening, written)
        if answer is None or not answer.lstrip().startswith(ANSWER):
            return None
        return f"{reasoning.strip()}\n{CLOSE_THINK}\n\n{said.strip()}{answer.lstrip().removeprefix(ANSWER)}"

    def _ended(self, messages: Sequence[Message], index: int, tools: Tools, context: str, answer: str) -> Turn:
        """The turn at an index, cut behind the token that ends it."""
        if closing := self._closing.search(answer):
            end = self._stop.search(answer, closing.start())
            assert end is not None  # the closing has one
            return Turn(context, answer[: end.end()], True)
        # Some models end a turn with the token that opens the next.
        following = messages[index + 1] if index + 1 < len(messages) else ANSWERED[0]
        try:
            text = self._renderer.render([*messages[: index + 1], following], tools)
        except Exception:  # it is not what is trained on
            text = ""
        rest = _behind(context + answer, text) or ""
        opening = self._stop.match(rest.lstrip())
        if opening is None:
            return Turn(context, answer, False)
        return Turn(context, answer + rest[: len(rest) - len(rest.lstrip())] + opening.group(), True)

    def _check_context(self, number: int, messages: Sequence[Message], tools: Tools, first: int, context: str) -> None:
        """The texts of what is said before an answer must be there, from the message at ``first`` on."""
        for tool in tools if first == 0 else ():
            name = str(tool.get("function", tool).get("name", ""))
            if not _holds(context, name):
                raise _refused(
                    number,
                    f"the chat template leaves out the tool {shortened(name)}",
                    "take a model whose template has tools, or give such a chat_template",
                )
        for index, message in enumerate(messages[first:], start=first):
            if message["role"] == "assistant" or all(_holds(context, text) for text in text_of(message).split(PLACE)):
                continue
            if not self._has_place(number, messages, tools, index):
                raise _refused(
                    number,
                    f"the chat template leaves out the text of the {message['role']}",
                    "say it in a turn that the template keeps, or set chat to false",
                )

    def _has_place(self, number: int, messages: Sequence[Message], tools: Tools, index: int) -> bool:
        """Whether a turn's text comes through at all: templates rewrite some, such as switches in a system's text."""
        probe = [*messages[:index], messages[index] | {"content": QUESTION}, *messages[index + 1 :]]
        return QUESTION in self._render(number, probe, tools, add_generation_prompt=True)

    def _begun_otherwise(self, number: int, messages: Sequence[Message], tools: Tools, context: str) -> RowError:
        """The error of a template that asks for an answer in other words than it begins one with."""
        asked = context.removeprefix(self._render(number, messages[:-1], tools))
        has_reasoning = bool(cut_reasoning(messages[-1])[0])
        reasons = OPEN_THINK in asked and CLOSE_THINK not in asked
        if reasons and not has_reasoning:
            mend = "give the answer's reasoning, as reasoning_content or in <think> tags before it"
        elif has_reasoning and CLOSE_THINK in asked:
            mend = "take its reasoning out"
        else:
            mend = "begin the answer so"
        return _refused(
            number,
            f"the chat template asks for an answer with {shortened(asked)} and then begins it otherwise, so that the "
            "answer cannot be told from the prompt",
            f"{mend}, give another chat_template, or set chat to false",
        )

    def _render(self, number: int, messages: Sequence[Message], tools: Tools, **options: bool) -> str:
        if not messages:
            raise _refused(number, *OPENS_WITH_ANSWER)
        try:
            return self._renderer.render(messages, tools, **options)
        except Exception as error:  # what a template's own code can raise is open-ended
            says = first_line(error)
            # What a template raises itself is a sentence for its users; anything else is a fault within it.
            meant = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
            how = f"refuses it and says {shortened(says)}" if meant else f"fails on it ({shortened(says)})"
            raise _refused(
                number, f"the chat template {how}", "give turns that it takes, or set chat to false"
            ) from error

    def _find_end_of_turn(self, special_tokens: Iterable[str]) -> str | None:
        """The last special token of what is behind an answer in any case, or the first of what is at the very end."""
        try:
            texts = [self._renderer.render(messages) for messages in (ANSWERED, [*ANSWERED, ANSWERED[0]])]
        except Exception:  # each row says what is wrong
            return None
        tail, middle = (text.partition(ANSWER)[2] for text in texts)
        tokens = rf"\s*({_any_of(special_tokens)})"
        found, at = re.match(tokens, tail), 0
        while (more := re.compile(tokens).match(tail, at)) and middle.startswith(tail[: more.end()]):
            found, at = more, more.end()
        return found.group(1) if found else None


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for any of some texts, the longest that fits; for nothing where there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _shared(one: str, other: str) -> str:
    """The longest text that both begin with."""
    return one[: next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))]


def _behind(context: str, text: str) -> str | None:
    """What follows a context in a text; None where the text begins otherwise. White space between may differ."""
    if text.startswith(context):
        return text[len(context) :]
    context = context.rstrip()
    return text[len(context) :].lstrip() if text.startswith(context) else None


def _holds(text: str, sought: str) -> bool:
    """Whether a text is there, whatever white space is in it: templates trim texts and set them apart."""
    return _squeezed(sought) in _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _refused(number: int, reason: str, mend: str) -> RowError:
    return RowError(RowFault(number, reason, mend))
