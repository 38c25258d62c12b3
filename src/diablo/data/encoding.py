"""Rows to tokens, each marked as prompt or supervised. Training, the dry run and generation all go through here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diablo.data.chat_template import ChatTemplate, Message
from diablo.data.rows import Row
from diablo.data.special_text import SpecialTextMode, TextTokenizer
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
        special_text: the special tokens that the row's own text spells, each as often as it does.
        source: the name of the file or dataset that the row is from; empty where there is only one.
    """

    number: int
    input_ids: list[int]
    labels: list[int]
    special_text: tuple[str, ...] = ()
    source: str = ""

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
        special_text: what becomes of a row's text that spells a special token: ``"keep"`` makes it that token,
            ``"plain"`` leaves it ordinary text. What a chat template writes is tokens in either case.
        stop_token_ids: further tokens that end a turn, as a model's generation config names them.

    Raises:
        UserError: the tokenizer has no end-of-text token, or ``chat`` is asked for and it has no chat template, or none
            that is valid.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool = False,
        special_text: SpecialTextMode = "keep",
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-text token, so that the model could never learn to stop.")
        if chat and not tokenizer.chat_template:
            raise UserError("chat: found true; the model's tokenizer has no chat template: set chat to false.")
        self.tokenizer = tokenizer
        self.chat = chat
        self.stop_token_ids = frozenset([tokenizer.eos_token_id, *stop_token_ids])
        self._template = ChatTemplate(tokenizer) if chat else None
        self._text = TextTokenizer(tokenizer, special_text)

    def encode(self, row: Row) -> EncodedRow:
        """The tokens of a row and which of them are supervised.

        Raises:
            UserError: the row is a conversation and ``chat`` is off, or the chat template refuses it, leaves out some
                of its text or rewrites earlier turns.
        """
        input_ids: list[int] = []
        labels: list[int] = []
        for context, completion in self._turns(row):
            input_ids += context + completion
            labels += [IGNORED] * len(context) + self._supervise(completion)
        return EncodedRow(row.number, input_ids, labels, self._text.spelled(self._texts(row)))

    def prompt(self, row: Row) -> list[int]:
        """The tokens before the row's last completion: what generation starts from.

        Raises:
            UserError: as :meth:`encode`, but that earlier turns may be rewritten.
        """
        if self._template is None:
            return self._prompt(row)
        pieces = self._template.prompt(row.number, self._guarded(row)[:-1])
        return [token for piece in pieces for token in self._text.ids(piece)]

    def _turns(self, row: Row) -> list[tuple[list[int], list[int]]]:
        """Pairs of context and completion, the last completion with a stop token at its end."""
        if self._template is not None:
            texts = self._template.turns(row.number, self._guarded(row))
            turns = [(self._text.ids(context), self._text.ids(answer)) for context, answer in texts]
        else:
            turns = [(self._prompt(row), self._text.ids(self._text.guard(row.completion)))]
        context, completion = turns[-1]
        if not self._ends_with_stop(completion):
            turns[-1] = (context, [*completion, self.tokenizer.eos_token_id])
        return turns

    def _prompt(self, row: Row) -> list[int]:
        """The tokens of a prompt that is put without a chat template."""
        if row.messages:
            raise UserError(f"Row {row.number} is a conversation; set chat to true to train on conversations.")
        # Special tokens that the tokenizer puts in front belong to the prompt; one that it puts behind does not.
        prompt = self._text.ids(self._text.guard(row.prompt), add_special_tokens=True)
        while prompt and prompt[-1] == self.tokenizer.eos_token_id:
            prompt.pop()
        return prompt

    def _guarded(self, row: Row) -> list[Message]:
        return [turn | {"content": self._text.guard(turn["content"])} for turn in row.as_messages()]

    def _texts(self, row: Row) -> list[str]:
        """The texts of a row that are trained on or come before."""
        return [turn["content"] for turn in row.as_messages()] if self.chat else [row.prompt, row.completion]

    def _ends_with_stop(self, completion: list[int]) -> bool:
        """Whether no text follows a completion's last stop token: a text may spell one anywhere."""
        end = self._after_last_stop(completion)
        return end > 0 and not self.tokenizer.decode(completion[end:], skip_special_tokens=True).strip()

    def _supervise(self, completion: list[int]) -> list[int]:
        """Labels of a completion: up to its stop token; what a template writes after that, the model never does."""
        end = self._after_last_stop(completion) or len(completion)
        return completion[:end] + [IGNORED] * (len(completion) - end)

    def _after_last_stop(self, completion: list[int]) -> int:
        """The index behind a completion's last stop token; 0 where it has none."""
        return max((index + 1 for index, token in enumerate(completion) if token in self.stop_token_ids), default=0)
