"""The forms in which a chat template reads messages, found by rendering short conversations, and rendering in them.

Templates differ in where they look for a text, for reasoning and for the arguments of a tool call, and what stands
elsewhere they mostly leave out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateSyntaxError

from diablo.data.conversations.messages import (
    CLOSE_THINK,
    OPEN_THINK,
    Message,
    cut_reasoning,
    join_system,
    text_of,
    with_calls,
)
from diablo.data.images import PLACE
from diablo.errors import UserError, first_line

# Texts that no template writes of itself, and that no change between capitals and small letters alters.
QUESTION, ANSWER = "7391058264", "5820461937"
_REASONING, _SYSTEM, _NAME, _KEY, _VALUE = "9164720583", "3047918265", "tool7391", "key5820", "6482759310"

_ASKED: Message = {"role": "user", "content": QUESTION}
ANSWERED: tuple[Message, ...] = (_ASKED, {"role": "assistant", "content": ANSWER})
"""A question and an answer."""
_CALLED: tuple[Message, ...] = (
    _ASKED,
    {"role": "assistant", "tool_calls": [{"function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}]},
)
_PROPERTIES = {_KEY: {"type": "string", "description": "a key"}}
_TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "a tool",
            "parameters": {"type": "object", "properties": _PROPERTIES, "required": [_KEY]},
        },
    },
)
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


def _with_images(content: str) -> list[dict[str, str]]:
    """A text with places for images as the parts that templates read."""
    parts: list[dict[str, str]] = []
    for index, text in enumerate(content.split(PLACE)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


@dataclass(frozen=True)
class Forms:
    """The forms in which a template reads messages.

    Attributes:
        in_parts: a text as a list of parts, as templates of models do that also see images.
        reasoning: the key of an answer's reasoning, or ``content`` where it is read from tags in there; empty where it
            is left out.
        arguments_as_text: a tool call's arguments as JSON text in place of a dict.
        no_system: a system's text goes before the first question, since a turn of its own is refused.
    """

    in_parts: bool = False
    reasoning: str = ""
    arguments_as_text: bool = False
    no_system: bool = False


class TemplateRenderer:
    """A tokenizer's chat template, given messages in the forms that it reads.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Attributes:
        forms: the forms.

    Raises:
        UserError: the template is no valid Jinja.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.forms = Forms()
        if not self._reads_texts():
            self.forms = Forms(in_parts=True)
            if not self._reads_texts():
                self.forms = Forms()
        self.forms = self._find_calls()
        self.forms = replace(self.forms, reasoning=self._find_reasoning())
        system: Message = {"role": "system", "content": _SYSTEM}
        is_refused = self._try((system, *ANSWERED)) is None and self._try(ANSWERED) is not None
        self.forms = replace(self.forms, no_system=is_refused)

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), **options: bool) -> str:
        """What the template writes.

        Args:
            messages: the conversation.
            tools: the tools that it offers, as JSON schemas.
            options: further variables of the template, such as ``add_generation_prompt``.

        Raises:
            Exception: of any kind; a template's own code can raise anything.
        """
        messages = join_system(messages) if self.forms.no_system else messages
        turns = [self._put(message) for message in messages]
        return self._tokenizer.apply_chat_template(turns, tools=list(tools) or None, tokenize=False, **options)

    def _put(self, message: Message) -> dict[str, Any]:
        """A message in the forms that the template reads."""
        forms, kept = self.forms, ("role", "name", "tool_call_id")
        put = {key: message[key] for key in kept if key in message}
        reasoning, content = cut_reasoning(message)
        if reasoning and forms.reasoning in _REASONING_KEYS:
            put[forms.reasoning] = reasoning.strip()
            content = content.lstrip()
        elif reasoning and not message.get("reasoning_content"):
            content = text_of(message)
        elif reasoning and forms.reasoning:
            content = f"{OPEN_THINK}\n{reasoning.strip()}\n{CLOSE_THINK}\n\n{content}"
        elif reasoning:
            put["reasoning_content"] = reasoning
        if message.get("tool_calls"):
            put["tool_calls"] = with_calls(message, as_text=forms.arguments_as_text)
        if message.get("images"):
            put["content"] = _with_images(content)
        else:
            put["content"] = [{"type": "text", "text": content}] if forms.in_parts else content
        return put

    def _try(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str | None:
        """What the template writes; None where it fails."""
        try:
            return self.render(messages, tools)
        except TemplateSyntaxError as error:
            raise UserError(
                f"chat: found true; the tokenizer's chat template is no valid Jinja (line {error.lineno}: "
                f"{first_line(error)}): mend it, or set chat to false."
            ) from None
        except Exception:  # it may read another form, and where it reads none each row says what is wrong
            return None

    def _reads_texts(self) -> bool:
        """Whether the template writes what is said in the form that is set."""
        text = self._try(ANSWERED)
        # A template that reads text may write a list of parts as Python or JSON has it, keys and all.
        is_listing = self.forms.in_parts and re.search(r"""["']type["']""", text or "")
        return text is not None and QUESTION in text and ANSWER in text and not is_listing

    def _find_calls(self) -> Forms:
        """The forms in which a tool call comes through; those that are set where it does in none."""
        known = self.forms
        for as_text in (False, True):
            self.forms = replace(known, arguments_as_text=as_text)
            text = self._try(_CALLED, _TOOLS)
            if text is not None and all(sought in text for sought in (_NAME, _KEY, _VALUE)):
                return self.forms
        return known

    def _find_reasoning(self) -> str:
        """Where the template reads the reasoning of the answer that comes last; empty where it reads it nowhere."""
        known = self.forms
        asked, answered = ANSWERED
        try:
            # Any template writes what is in the content, but not all mean it as reasoning.
            has_tags = CLOSE_THINK in self._tokenizer.get_chat_template()
            for form in (*_REASONING_KEYS, *(["content"] if has_tags else [])):
                self.forms = replace(known, reasoning=form)
                # Some write it only where a tool is called.
                for last, tools in ((answered, ()), *([(_CALLED[-1], _TOOLS)] if form != "content" else [])):
                    if _REASONING in (self._try((asked, last | {"reasoning_content": _REASONING}), tools) or ""):
                        return form
        finally:
            self.forms = known
        return ""
