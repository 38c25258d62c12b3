"""Rows to tokens, each marked as prompt or supervised. Training, the dry run and generation all go through here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from diablo.data.rows import Row
from diablo.errors import UserError

IGNORED = -100
"""The label of a token that carries no loss, as PyTorch's cross-entropy has it."""


@dataclass(frozen=True)
class EncodedRow:
    """A row as the model sees it.

    Attributes:
        number: where the row stands in its file.
        input_ids: the tokens.
        labels: the token itself where it is supervised, :data:`IGNORED` elsewhere; as long as ``input_ids``.
    """

    number: int
    input_ids: list[int]
    labels: list[int]

    @property
    def features(self) -> dict[str, list[int]]:
        """What a collator takes."""
        return {"input_ids": self.input_ids, "labels": self.labels}

    @property
    def supervised(self) -> int:
        """The number of tokens that carry loss: the first token of a row is predicted from nothing and carries none."""
        return sum(label != IGNORED for label in self.labels[1:])


class RowEncoder:
    """Turns rows into tokens.

    Prompt and completion are tokenized apart, so that the prompt's tokens are those that the model sees when it
    generates, and every completion ends with a supervised stop token, so that the model learns to stop. Padding is told
    apart by position, never by its id: a padding token that equals the end-of-text token does no harm.

    Args:
        tokenizer: a transformers tokenizer.
        chat: put rows as conversations, through the tokenizer's chat template.
        stop_token_ids: further tokens that end a turn, as a model's generation config names them.

    Raises:
        UserError: the tokenizer has no end-of-text token, or ``chat`` is asked for and it has no chat template.
    """

    def __init__(self, tokenizer: Any, *, chat: bool = False, stop_token_ids: Iterable[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-text token, so that the model could never learn to stop.")
        if chat and not tokenizer.chat_template:
            raise UserError("chat: found true; the model's tokenizer has no chat template: set chat to false.")
        self.tokenizer = tokenizer
        self.chat = chat
        self.stop_token_ids = frozenset([tokenizer.eos_token_id, *stop_token_ids])

    def encode(self, row: Row) -> EncodedRow:
        """The tokens of a row and which of them are supervised.

        Raises:
            UserError: the row is a conversation and ``chat`` is off, or the chat template refuses it or rewrites
                earlier turns.
        """
        input_ids: list[int] = []
        labels: list[int] = []
        for context, completion in self._turns(row):
            input_ids += context + completion
            labels += [IGNORED] * len(context) + self._supervise(completion)
        if labels[-1] == IGNORED and not self.stop_token_ids & {label for label in labels if label != IGNORED}:
            raise UserError(f"Row {row.number}: no stop token is supervised.")
        return EncodedRow(row.number, input_ids, labels)

    def prompt(self, row: Row) -> list[int]:
        """The tokens before the row's last completion: what generation starts from."""
        *earlier, (context, _) = self._turns(row)
        return [token for turn in earlier for part in turn for token in part] + context

    def _turns(self, row: Row) -> list[tuple[list[int], list[int]]]:
        """Pairs of context and completion, the last completion with a stop token at its end."""
        if self.chat:
            turns = [(self._tokens(context), self._tokens(text)) for context, text in self._render(row)]
        elif row.messages:
            raise UserError(f"Row {row.number} is a conversation; set chat to true to train on conversations.")
        else:
            # Special tokens that the tokenizer puts in front belong to the prompt; one that it puts behind does not.
            prompt = self.tokenizer(row.prompt)["input_ids"]
            while prompt and prompt[-1] == self.tokenizer.eos_token_id:
                prompt.pop()
            turns = [(prompt, self._tokens(row.completion))]
        context, completion = turns[-1]
        if not self.stop_token_ids & set(completion):
            turns[-1] = (context, [*completion, self.tokenizer.eos_token_id])
        return turns

    def _render(self, row: Row) -> list[tuple[str, str]]:
        """The texts of a conversation: what precedes each assistant's turn, and the turn."""
        messages = list(row.as_messages())
        rendered, turns = "", []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                before = self._template(messages[:index], add_generation_prompt=True)
                after = self._template(messages[: index + 1])
            except (TemplateError, ValueError, TypeError) as error:
                raise UserError(f"Row {row.number}: the chat template cannot put it: {error}.") from None
            if not before.startswith(rendered) or not after.startswith(before):
                raise UserError(
                    f"Row {row.number}: the chat template rewrites earlier turns, so that they cannot be told from the "
                    "completion; give rows of one question and one answer, or set chat to false."
                )
            turns.append((before[len(rendered) :], after[len(before) :]))
            rendered = after
        return turns

    def _template(self, messages: list[dict[str, str]], **options: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _supervise(self, completion: list[int]) -> list[int]:
        """Labels of a completion: up to its stop token; what a template writes after that, the model never does."""
        stops = [index for index, token in enumerate(completion) if token in self.stop_token_ids]
        end = stops[-1] + 1 if stops else len(completion)
        return completion[:end] + [IGNORED] * (len(completion) - end)
