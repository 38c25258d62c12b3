"""Prompts to tokens, in the form that a model or an adapter was trained with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from diablo.data import Row, RowEncoder
from diablo.errors import UserError
from diablo.records.results import recipe_of_run
from diablo.serving.adapters import Adapter


@dataclass
class Prompts:
    """Turns what a client sends into tokens.

    Texts of a conversation that spell a special token stay text, so that no client can end a turn of another role. A
    prompt that is no conversation is read as the model was trained to read it.

    Args:
        tokenizer: a transformers tokenizer.
        stops: tokens that the model's configs name as ends of a text.
        special_text: what becomes of a plain prompt that spells a special token.
        form: how the model or adapter was trained to be asked.
    """

    tokenizer: Any
    stops: Sequence[int]
    special_text: Any = "keep"
    form: Literal["chat", "completions"] = "completions"

    def __post_init__(self) -> None:
        self._plain = RowEncoder(self.tokenizer, special_text=self.special_text, stop_token_ids=self.stops)
        self._chat: RowEncoder | None = None
        if self.tokenizer.chat_template:
            self._chat = RowEncoder(self.tokenizer, chat=True, special_text="plain", stop_token_ids=self.stops)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return self._chat is not None

    def completion(self, text: str) -> tuple[list[int], frozenset[int]]:
        """The tokens of a text that is gone on with, and those that end what is written.

        Raises:
            UserError: the text is empty.
        """
        return _some(self._plain.prompt(Row(1, text, "?")), "prompt"), self._plain.stop_token_ids

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], frozenset[int]]:
        """The tokens of a conversation whose next turn is to be written, and those that end it.

        Args:
            messages: the turns, each with ``role`` and ``content``.

        Raises:
            UserError: there is no chat template, or it refuses the conversation.
        """
        if self._chat is None:
            raise UserError("messages: this model has no chat template; use /v1/completions with a prompt.")
        turns = [dict(message) for message in messages]
        row = Row(1, messages=(*turns, {"role": "assistant", "content": "?"}))
        return _some(self._chat.prompt(row), "messages"), self._chat.stop_token_ids


class PromptsByAdapter:
    """The prompts of the base model and of each adapter, which may have been trained with a chat template of its own.

    Args:
        tokenizer: the base model's tokenizer.
        stops: tokens that its configs name as ends of a text.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[int]) -> None:
        self._stops = tuple(stops)
        has_template = bool(tokenizer.chat_template)
        self._base = Prompts(tokenizer, self._stops, form="chat" if has_template else "completions")
        self._own: WeakKeyDictionary[Adapter, Prompts] = WeakKeyDictionary()
        # Many adapters were trained alike, and a chat template takes a while to be looked into.
        self._alike: dict[tuple[Any, ...], Prompts] = {}

    def of(self, adapter: Adapter | None) -> Prompts:
        """The prompts of an adapter; those of the base model for None.

        Raises:
            UserError: the adapter's run cannot be read, or its chat template is none.
        """
        if adapter is None:
            return self._base
        if adapter not in self._own:
            self._own[adapter] = self._made(adapter)
        return self._own[adapter]

    def _made(self, adapter: Adapter) -> Prompts:
        try:
            recipe = recipe_of_run(adapter.folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"The run of the adapter {adapter.name!r} cannot be read: {error}.") from None
        if not recipe:
            return self._base
        template, form = recipe.get("chat_template"), "chat" if recipe.get("chat") else "completions"
        special_text = (recipe.get("data") or {}).get("special_text", "keep")
        if (template, special_text, form) not in self._alike:
            tokenizer = copy.copy(self._base.tokenizer)
            tokenizer.chat_template = template or tokenizer.chat_template
            made = Prompts(tokenizer, self._stops, special_text, "chat" if recipe.get("chat") else "completions")
            self._alike[template, special_text, form] = made
        return self._alike[template, special_text, form]


def _some(tokens: list[int], key: str) -> list[int]:
    if not tokens:
        raise UserError(f"{key}: found an empty prompt; give one token or more.")
    return tokens
