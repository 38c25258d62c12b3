"""Rows to tokens, each marked as prompt or supervised. Training, the dry run and generation all go through here."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from diablo.data.conversations.chat_template import ChatTemplate, Turn
from diablo.data.conversations.messages import Message, map_texts, map_values, texts_of
from diablo.data.faults import RowError, RowFault
from diablo.data.images import Image
from diablo.data.rows import Row
from diablo.data.special_text import SpecialTextMode, TextTokenizer
from diablo.data.vision import ImageProcessor
from diablo.errors import UserError

IGNORED = -100
"""The label of a token that carries no loss, as PyTorch's cross-entropy has it."""


def words_at_joint(prompt: str, completion: str) -> str:
    """The last word of a prompt with the first one of its completion, where nothing stands between; empty elsewhere.

    Scripts without upper and lower case, such as Chinese, are left alone: many of them have no spaces between words.
    """
    ends = (prompt[-1:], completion[:1])
    if not all(end.isdigit() or end.lower() != end.upper() for end in ends):
        return ""
    return prompt.rsplit(maxsplit=1)[-1] + completion.split(maxsplit=1)[0]


@dataclass(frozen=True)
class EncodedRow:
    """A row as the model sees it, or one of several that a conversation makes.

    Attributes:
        number: where the row stands in its file.
        input_ids: the tokens.
        labels: the token itself where it is supervised, :data:`IGNORED` elsewhere; as long as ``input_ids``.
        special_text: the special tokens that the row's own text spells, each as often as it does.
        apart: why answers of the conversation are trained in rows of their own, in words; empty where they are not.
        joined_system: whether a system's text was put before the first question.
        run_together: the last word of the prompt with the first one of the completion, where nothing stands between
            them; empty elsewhere.
        source: the name of the file or dataset that the row is from; empty where there is only one.
        rejected: the same prompt with a worse completion, where the row is a pair.
        desired: whether the completion is a good one, where the row is judged; None where it is not.
        row: the row itself, where it is a prompt whose completions get rewards; None where it is not.
        target: what a model with a head is to say of the whole row: the index of a label, a 1 or 0 for each label, or a
            number. None where it says nothing, or something of each token, which is then in ``labels``.
        token_types: which of two texts each token belongs to, where the model is told.
        is_cut: whether the end of the text was cut off, or that of one of several.
        images: the images that its tokens stand for, in their order.
        others: the texts that this one is compared with, as :class:`Row` has them; empty where nothing is compared.
        read: how many of the tokens, the first ones, the encoder of an encoder-decoder reads; its decoder writes the
            others. None where one stack of layers goes through all.
    """

    number: int
    input_ids: list[int]
    labels: list[int]
    special_text: tuple[str, ...] = ()
    apart: str = ""
    joined_system: bool = False
    run_together: str = ""
    source: str = ""
    rejected: EncodedRow | None = None
    desired: bool | None = None
    row: Row | None = None
    target: int | float | tuple[float, ...] | None = None
    token_types: list[int] | None = None
    is_cut: bool = False
    images: tuple[Image, ...] = ()
    others: tuple[EncodedRow, ...] = ()
    read: int | None = None

    @property
    def features(self) -> dict[str, list[int]]:
        """What a collator takes."""
        if self.read is None:
            return {"input_ids": self.input_ids, "labels": self.labels}
        return {"input_ids": self.input_ids[: self.read], "written": self.labels[self.read :]}

    @property
    def parts(self) -> list[int]:
        """The tokens of each part that is padded by itself: of the row, or of what is read and what is written."""
        return [len(self.input_ids)] if self.read is None else [self.read, len(self.input_ids) - self.read]

    @property
    def sequences(self) -> list[EncodedRow]:
        """What the model reads of the row: itself, the worse completion of a pair, and what it is compared with."""
        return [self, *([] if self.rejected is None else [self.rejected]), *self.others]

    @property
    def length(self) -> int:
        """The tokens of its longest sequence."""
        return max(len(row.input_ids) for row in self.sequences)

    @property
    def tokens(self) -> int:
        """The tokens of all its sequences."""
        return sum(len(row.input_ids) for row in self.sequences)

    @property
    def supervised(self) -> int:
        """The number of tokens that carry loss: the first token of a row is predicted from nothing and carries none."""
        return sum(label != IGNORED for row in self.sequences for label in row.labels[1:])


class RowEncoder:
    """Turns rows into tokens.

    A completion is trained in the context that generation gives it, token by token: the prompt's tokens are those that
    the model sees when it generates, and the completion's follow. Every completion ends with a supervised stop token,
    so that the model learns to stop. Padding is told apart by position, never by its id: a padding token that equals
    the end-of-text token does no harm.

    The encoder of an encoder-decoder reads the prompt, which ends with the end-of-text token, and its decoder writes
    the completion. Each is tokenized by itself, with the special tokens that the tokenizer puts around a text.

    Args:
        tokenizer: a transformers tokenizer.
        chat: put rows as conversations, through the tokenizer's chat template.
        special_text: what becomes of a row's text that spells a special token: ``"keep"`` makes it that token,
            ``"plain"`` leaves it ordinary text. What a chat template writes is tokens in either case.
        stop_token_ids: further tokens that end a turn, as a model's generation config names them.
        has_completions: whether rows have completions, which end with a stop token; those of a classifier have none.
        images: makes tokens of images; None where the model sees none, or no row has any.
        encoder_decoder: whether the model reads the prompt with an encoder and writes the completion with a decoder.

    Attributes:
        stop_token_ids: the tokens that stop generation: those, the end of text, and the token that the chat template
            ends an answer with.

    Attributes:
        texts: texts to tokens, as ``special_text`` says.

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
        has_completions: bool = True,
        images: ImageProcessor | None = None,
        encoder_decoder: bool = False,
    ) -> None:
        if has_completions and tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end-of-text token, so that the model could never learn to stop.")
        if chat and not tokenizer.chat_template:
            raise UserError(
                "chat: found true; the model's tokenizer has no chat template: give one with chat_template (a file of "
                "Jinja, or the Jinja itself), or set chat to false."
            )
        self.tokenizer = tokenizer
        self.chat = chat
        self.images = images
        self.encoder_decoder = encoder_decoder
        self.stop_token_ids = frozenset([tokenizer.eos_token_id, *stop_token_ids]) if has_completions else frozenset()
        self.texts = TextTokenizer(tokenizer, special_text)
        self._template: ChatTemplate | None = None
        if chat:
            special = self.texts.special_tokens
            ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
            stops = [token for token in special if ids[token] in self.stop_token_ids]
            self._template = ChatTemplate(tokenizer, special_tokens=special, stops=stops)
            if self._template.end_of_turn is not None:
                self.stop_token_ids |= {ids[self._template.end_of_turn]}

    @cached_property
    def newline_token_ids(self) -> frozenset[int]:
        """The ids of all tokens that contain a line break. Each of them ends an answer of one line."""
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        return frozenset(token for token, text in enumerate(texts) if "\n" in text)

    def encode_all(self, row: Row) -> list[EncodedRow]:
        """The tokens of a row and which of them are supervised.

        A conversation is one row as long as each answer's context begins with what comes before it in the row. Where it
        does not, as with templates that take the reasoning out of earlier answers, another row begins: with the
        context that generation gives that answer. For an encoder-decoder every answer is a row of its own.

        Raises:
            UserError: the row is a conversation and ``chat`` is off, or the chat template refuses it, or leaves out
                some of its text.
        """
        if row.rejected is not None or row.desired is not None:
            return [self._preference(row)]
        spelled = self.texts.spelled(self._own_texts(row))
        if self._template is None:
            prompt, completion = self._prompt(row), self._completion(row)
            labels = [IGNORED] * len(prompt) + self._supervise(completion)
            read = len(prompt) if self.encoder_decoder else None
            joint = "" if self.encoder_decoder else words_at_joint(row.prompt, row.completion)
            return [EncodedRow(row.number, prompt + completion, labels, spelled, read=read, run_together=joint)]
        messages = row.as_messages()
        joined_system = self._template.has_no_system and messages[0]["role"] == "system"
        turns = self._template.turns(row.number, *self._guarded(row))
        if self.encoder_decoder:
            apart = "an encoder-decoder writes one answer to all that it reads" if len(turns) > 1 else ""
            sequences = [self._read_and_written(row, turn) for turn in turns]
        else:
            sequences, apart = self._sequences(row, turns)
        return [
            replace(each, special_text=() if index else spelled, apart=apart, joined_system=joined_system)
            for index, each in enumerate(sequences)
        ]

    def _preference(self, row: Row) -> EncodedRow:
        """A pair or a judged completion.

        Raises:
            UserError: a completion has several answers that do not stand in one sequence.
        """
        sequences = []
        for each in (replace(row, rejected=None, desired=None), row.rejected):
            encoded = [] if each is None else self.encode_all(each)
            if len(encoded) > 1:
                mend = "give a completion of one answer, or a chat_template that keeps earlier turns as they are"
                raise RowError(RowFault(row.number, f"its answers cannot be put together: {encoded[0].apart}", mend))
            sequences += encoded
        chosen, *rejected = sequences
        spelled = tuple(token for each in sequences for token in each.special_text)
        return replace(chosen, special_text=spelled, rejected=rejected[0] if rejected else None, desired=row.desired)

    def encode(self, row: Row) -> EncodedRow:
        """The tokens of a row, those of its last answer where it makes several; see :meth:`encode_all`."""
        return self.encode_all(row)[-1]

    def encode_prompt(self, row: Row) -> EncodedRow:
        """The tokens that generation starts from, none of them supervised, with the row itself.

        Raises:
            UserError: as :meth:`encode_all`.
        """
        ids = self.prompt(row)
        own = [text for message in row.as_messages()[:-1] for text in texts_of(message)] if self.chat else [row.prompt]
        return EncodedRow(row.number, ids, [IGNORED] * len(ids), self.texts.spelled(own), row=row, images=row.images)

    def prompt(self, row: Row) -> list[int]:
        """The tokens before the row's last completion: what generation starts from.

        Raises:
            UserError: as :meth:`encode_all`.
        """
        if self._template is None:
            return self._prompt(row)
        messages, tools = self._guarded(row)
        return self.texts.ids(self._expanded(row, self._template.prompt(row.number, messages[:-1], tools)))

    def _sequences(self, row: Row, turns: Sequence[Turn]) -> tuple[list[EncodedRow], str]:
        """The rows that answers make, and why they are several, if they are."""
        sequences: list[tuple[list[int], list[int], int]] = []
        apart = ""
        for index, turn in enumerate(turns):
            context = self.texts.ids(self._expanded(row, turn.context, turn.images))
            self._expanded(row, turn.answer, 0)
            ids, labels, _ = sequences[-1] if sequences else ([], [], 0)
            if not sequences or context[: len(ids)] != ids:
                apart = apart or (_why_apart(turns[index - 1], turn) if index else "")
                ids, labels = [], []
                sequences.append((ids, labels, turn.images))
            sequences[-1] = (ids, labels, turn.images)
            completion = self.texts.continuation(turn.context, turn.answer)
            completion += [] if turn.ends else [self.tokenizer.eos_token_id]
            labels += [IGNORED] * (len(context) - len(ids)) + completion
            ids += context[len(ids) :] + completion
        return [
            EncodedRow(row.number, ids, labels, images=row.images[:count]) for ids, labels, count in sequences
        ], apart

    def _read_and_written(self, row: Row, turn: Turn) -> EncodedRow:
        """An answer of an encoder-decoder behind all that its encoder reads."""
        context, answer = self.texts.ids(self._expanded(row, turn.context, turn.images)), self.texts.ids(turn.answer)
        answer += [] if turn.ends else [self.tokenizer.eos_token_id]
        labels = [IGNORED] * len(context) + answer
        return EncodedRow(row.number, context + answer, labels, images=row.images[: turn.images], read=len(context))

    def _expanded(self, row: Row, text: str, count: int | None = None) -> str:
        """A text that the template wrote with the tokens of the row's images in their places.

        Args:
            row: the row.
            text: the text.
            count: how many of the row's images it has, the first ones; all where None.

        Raises:
            RowError: it has another number of places for images, or the model sees none.
        """
        images = row.images[:count]
        if self.images is None:
            if images:
                mend = "take a model that sees images, or take them out of the rows"
                raise RowError(RowFault(row.number, "has images, and the model sees none", mend))
            return text
        first, *rest = self.texts.split_at(self.images.token, text)
        if len(rest) > len(images):
            mend = "set data.special_text to plain, or take it out"
            raise RowError(
                RowFault(row.number, f"its text spells {self.images.token}, which stands for an image", mend)
            )
        if len(rest) < len(images):
            mend = "put the images where the template reads them, in turns of the user"
            raise RowError(RowFault(row.number, "the chat template leaves out an image", mend))
        if not images:
            return text
        together = zip(self.images.replacements(images), rest, strict=True)
        return first + "".join(tokens + following for tokens, following in together)

    def _prompt(self, row: Row) -> list[int]:
        """The tokens of a prompt that is put without a chat template."""
        if row.messages and not self.tokenizer.chat_template:
            raise UserError(
                f"Row {row.number} is a conversation, and the model's tokenizer has no chat template; give rows with a "
                "prompt and a completion, or a chat_template and chat: true."
            )
        if row.messages:
            raise UserError(f"Row {row.number} is a conversation; set chat to true to train on conversations.")
        # Special tokens that the tokenizer puts in front belong to the prompt; one that it puts behind does not.
        prompt = self.texts.ids(self.texts.guard(row.prompt), add_special_tokens=True)
        if self.encoder_decoder:
            special = set(self.tokenizer.all_special_ids)
            # Some tokenizers put the name of the language behind it.
            ends = itertools.takewhile(lambda token: token in special, reversed(prompt))
            return prompt if self.tokenizer.eos_token_id in ends else [*prompt, self.tokenizer.eos_token_id]
        while prompt and prompt[-1] == self.tokenizer.eos_token_id:
            prompt.pop()
        return prompt

    def _completion(self, row: Row) -> list[int]:
        """The tokens of a completion without a chat template, with a stop token unless it brings one."""
        if self.encoder_decoder:
            completion = self.texts.ids(self.texts.guard(row.completion), add_special_tokens=True)
        else:
            completion = self.texts.continuation(self.texts.guard(row.prompt), self.texts.guard(row.completion))
        return completion if self._ends_with_stop(completion) else [*completion, self.tokenizer.eos_token_id]

    def _guarded(self, row: Row) -> tuple[list[Message], list[dict[str, Any]]]:
        messages = [map_texts(message, self.texts.guard) for message in row.as_messages()]
        return messages, [map_values(tool, self.texts.guard) for tool in row.tools]

    def _own_texts(self, row: Row) -> list[str]:
        """The texts of a row that are trained on or come before."""
        if not self.chat:
            return [row.prompt, row.completion]
        return [text for message in row.as_messages() for text in texts_of(message)]

    def _ends_with_stop(self, completion: list[int]) -> bool:
        """Whether no text follows a completion's last stop token: a text may spell one anywhere."""
        end = self._after_last_stop(completion)
        return end > 0 and not self.tokenizer.decode(completion[end:], skip_special_tokens=True).strip()

    def _supervise(self, completion: list[int]) -> list[int]:
        """Labels of a completion: up to its last stop token, since the model writes nothing after that."""
        end = self._after_last_stop(completion)
        return completion[:end] + [IGNORED] * (len(completion) - end)

    def _after_last_stop(self, completion: list[int]) -> int:
        """The index behind a completion's last stop token; 0 where it has none."""
        return max((index + 1 for index, token in enumerate(completion) if token in self.stop_token_ids), default=0)


def _why_apart(turn: Turn, following: Turn) -> str:
    if not following.context.startswith(turn.context + turn.answer):
        return "the chat template rewrites earlier turns"
    return (
        "the tokens of an answer run together with what follows it"
        if turn.ends
        else "the chat template ends an answer with no token that stops generation"
    )
