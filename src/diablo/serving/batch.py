"""Rows that are decoded together, one token a forward. Others join and leave at any forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from diablo.errors import UserError
from diablo.serving.sampling import Likely, Sampling, choose, likelihoods
from diablo.serving.text import TextStream


@dataclass(frozen=True)
class Ask:
    """What a completion is asked for.

    Attributes:
        prompt: the prompt's tokens, one or more.
        most: the most tokens that are written.
        stops: tokens that end the completion.
        stop_strings: texts before which it ends.
        sampling: how tokens are chosen.
        logprobs: how many of the likeliest tokens are told with each token; None tells nothing.
    """

    prompt: tuple[int, ...]
    most: int
    stops: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one forward adds to a completion.

    Attributes:
        text: the text that is certain by now and was not told before.
        written: the tokens that the completion has by now.
        likely: the new token, where that was asked for.
        end: why the completion has ended: ``"stop"``, or ``"length"``; None where it goes on.
    """

    text: str
    written: int
    likely: Likely | None = None
    end: str | None = None


class Row:
    """A completion under way.

    Args:
        key: what tells it from others.
        ask: what is asked for.
        tokenizer: decodes its tokens.
        adapter: what tells its adapter from others.
    """

    def __init__(self, key: Hashable, ask: Ask, tokenizer: Any, adapter: Any = None) -> None:
        self.key, self.ask, self.adapter = key, ask, adapter
        self.last = ask.prompt[-1]
        self.written = 0
        self._text = TextStream(tokenizer, ask.prompt, ask.stop_strings)

    def take(self, token: int, likely: Likely | None) -> Piece:
        """Take the next token."""
        self.last = token
        self.written += 1
        if token in self.ask.stops:
            return Piece(self._text.end(), self.written, likely, "stop")
        text = self._text.push(token)
        if self._text.is_stopped:
            return Piece(text, self.written, likely, "stop")
        if self.written >= self.ask.most:
            text += self._text.end()
            return Piece(text, self.written, likely, "stop" if self._text.is_stopped else "length")
        return Piece(text, self.written, likely)


def no_context(first: int, rows: Sequence[Row]) -> AbstractContextManager[None]:
    """What stands around a forward in which no row differs from the others."""
    return nullcontext()


class Batch:
    """Rows that are decoded together with what stands in the weights. Its keys and values are its own.

    Rows are padded on the left, where the model does not look, so that all of them end at the same place.

    Args:
        model: a causal language model in evaluation mode.

    Attributes:
        rows: the rows, in the order in which they stand.
        around: called before each forward with the place of its first row and with its rows; the forward is made inside
            of what that gives. It is for what differs from row to row.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.around: Callable[[int, Sequence[Row]], AbstractContextManager[None]] = no_context
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=model.device)
        taken = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._takes_positions = "position_ids" in taken

    def join(self, rows: Sequence[Row]) -> list[tuple[Row, Piece]]:
        """Read the prompts of rows, and write the first token of each. Those that do not end with it stay."""
        longest = max(len(row.ask.prompt) for row in rows)
        ids = torch.tensor([[row.ask.prompt[0]] * (longest - len(row.ask.prompt)) + [*row.ask.prompt] for row in rows])
        mask = torch.tensor([[0] * (longest - len(row.ask.prompt)) + [1] * len(row.ask.prompt) for row in rows])
        ids, mask = ids.to(self._mask.device), mask.to(self._mask.device)
        cache: Any = DynamicCache()
        with self.around(len(self.rows), rows):
            logits = self._forward(ids, mask, (mask.cumsum(dim=-1) - 1).clamp(min=0), cache)
        self._append(rows, cache, mask)
        return self._taken(logits, rows)

    def step(self) -> list[tuple[Row, Piece]]:
        """Write the next token of each row. Those that end with it leave."""
        ids = torch.tensor([[row.last] for row in self.rows], device=self._mask.device)
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        positions = self._mask.sum(dim=-1, keepdim=True) - 1
        with self.around(0, self.rows):
            logits = self._forward(ids, self._mask, positions, self._cache)
        return self._taken(logits, self.rows)

    def absorb(self, other: Batch) -> None:
        """Take the rows of another batch with their keys and values. The other one is not used any more."""
        if other.rows:
            self._append(other.rows, other._cache, other._mask)

    def split(self, goes: Callable[[Row], bool]) -> Batch:
        """Let rows leave with their keys and values.

        Args:
            goes: whether a row leaves.

        Returns:
            A batch of these.
        """
        other = Batch(self._model)
        other.rows, other._mask = self.rows, self._mask
        if self.rows:
            other._cache = copy.copy(self._cache)
            other._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        other.keep(goes)
        self.keep(lambda row: not goes(row))
        return other

    def keep(self, is_kept: Callable[[Row], bool]) -> None:
        """Let rows leave, and free the memory of their keys and values.

        Args:
            is_kept: whether a row stays.
        """
        kept = [index for index, row in enumerate(self.rows) if is_kept(row)]
        if len(kept) == len(self.rows):
            return
        # The last ones take the places that become free, so that most rows keep theirs.
        free = sorted(set(range(len(kept))).difference(kept))
        places = kept[: len(kept) - len(free)]
        for place, index in zip(free, kept[len(places) :], strict=True):
            places.insert(place, index)
        self.rows = [self.rows[index] for index in places]
        if not places:
            self._cache, self._mask = None, self._mask[:0, :0]
            return
        chosen = torch.tensor(places, device=self._mask.device)
        mask = self._mask[chosen]
        # What stood left of the longest row that stays is padding now.
        first = int(mask.any(dim=0).nonzero()[0])
        self._mask = mask[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen][..., first:, :].contiguous()
            layer.values = layer.values[chosen][..., first:, :].contiguous()

    def _append(self, rows: Sequence[Row], cache: Any, mask: torch.Tensor) -> None:
        """Put rows with their keys and values behind those that are there."""
        if not self.rows:
            self._cache, self._mask, self.rows = cache, mask, list(rows)
            return
        length = max(mask.shape[1], self._mask.shape[1])
        for own, new in zip(self._cache.layers, cache.layers, strict=True):
            own.keys = torch.cat([_padded(own.keys, length), _padded(new.keys, length)])
            own.values = torch.cat([_padded(own.values, length), _padded(new.values, length)])
        self._mask = torch.cat([functional.pad(part, (length - part.shape[1], 0)) for part in (self._mask, mask)])
        self.rows = [*self.rows, *rows]

    def _taken(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[tuple[Row, Piece]]:
        tokens = choose(logits, [row.ask.sampling for row in rows])
        likely = likelihoods(logits, tokens, [row.ask.logprobs for row in rows])
        pieces = [(row, row.take(token, own)) for row, token, own in zip(rows, tokens, likely, strict=True)]
        ended = {row.key for row, piece in pieces if piece.end is not None}
        self.keep(lambda row: row.key not in ended)
        return pieces

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """The logits behind each row's last token, ``(rows, vocabulary)``."""
        where = {"position_ids": positions} if self._takes_positions else {}
        output = self._model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where, **self._last_only
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@torch.no_grad()
def check_decoding(model: Any, name: str) -> None:
    """Check that rows of a model can join and leave a batch: that it keeps keys and values of all tokens, and no more.

    Args:
        model: the model.
        name: what it is called, for messages.

    Raises:
        UserError: it does not.
    """
    batch, cache = Batch(model), DynamicCache()
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    batch._forward(ids, torch.ones_like(ids), torch.arange(2, device=model.device)[None], cache)
    plain = bool(cache.layers) and all(
        type(layer) is DynamicLayer and layer.get_seq_length() == 2 for layer in cache.layers
    )
    if not plain:
        raise UserError(
            f"model: {name!r} keeps something else than keys and values of attention between tokens, so that rows "
            "cannot join and leave a batch; ask it with diablo generate, or serve it with another engine."
        )


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(states, (0, 0, length - states.shape[-2], 0))
