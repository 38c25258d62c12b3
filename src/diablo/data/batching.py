"""Batches of rows of similar length, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch.utils.data import Sampler

from diablo.data.encoding import IGNORED, EncodedRow
from diablo.data.vision import ImageProcessor

_BATCHES_SORTED_TOGETHER = 50
_TURNS = 3
"""How often rows with a text of another row are looked for: one that has found no place may find one later."""


class LengthGroupedSampler(Sampler[int]):
    """Row indices such that consecutive ``batch_size`` rows have similar lengths, and batches come in random order.

    The rows are shuffled, sorted by length within groups of 50 batches, cut into batches, and the batches are
    shuffled. (transformers' sampler of this name leaves the batches of a group sorted, long rows first, so that the
    mean length, and with it the loss, drifts in the course of a group.) Nothing but ``seed`` and the epoch decides the
    order, so that a resumed run goes on with the same batches.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch, over all accumulation steps and processes.
        seed: the run's seed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next."""
        self.epoch = epoch

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.lengths) / self.batch_size)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return (index for batch in self.batches() for index in batch)

    def batches(self) -> list[list[int]]:
        """The epoch's batches, each a list of row indices; the smaller rest comes last, where it is one."""
        generator = random.Random(f"{self.seed}-{self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        rest = order[len(order) - len(order) % self.batch_size :]
        whole = order[: len(order) - len(rest)]
        group = self.batch_size * _BATCHES_SORTED_TOGETHER
        batches = []
        for start in range(0, len(whole), group):
            by_length = sorted(whole[start : start + group], key=lambda index: self.lengths[index])
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        generator.shuffle(batches)
        return batches + ([rest] if rest else [])

    def padding_share(self, micro_batch_size: int | None = None, parts: Sequence[Sequence[int]] | None = None) -> float:
        """The share of padding among the epoch's tokens, from 0 to 1.

        Args:
            micro_batch_size: rows padded together; the whole batch where None.
            parts: the tokens of each row in each part that is padded by itself; rows are one part where None.
        """
        size = micro_batch_size or self.batch_size
        micro = [batch[i : i + size] for batch in self.batches() for i in range(0, len(batch), size)]
        padded, tokens = 0, 0
        for lengths in parts or [self.lengths]:
            tokens += sum(lengths[index] for rows in micro for index in rows)
            padded += sum(len(rows) * max(lengths[index] for index in rows) for rows in micro)
        return 1 - tokens / padded


class GroupSampler(LengthGroupedSampler):
    """Prompts in groups: a batch has each of its prompts several times in a row, once for each completion.

    TRL's trainer takes a batch in each forward, and passes those by whose completions it has already: so a batch comes
    several times. The last batch of an epoch is filled up with prompts of the epoch's start, so that every batch is
    whole.

    Args:
        lengths: tokens of each prompt.
        batch_size: completions of a batch, over all accumulation steps and processes; a multiple of ``generations``.
        seed: the run's seed.
        generations: completions of a prompt.
        iterations: optimizer steps on the same completions.
        accumulation: forwards of an optimizer step.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, generations: int, iterations: int, accumulation: int
    ) -> None:
        super().__init__(lengths, batch_size, seed)
        self.generations, self.iterations, self.accumulation = generations, iterations, accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.lengths) * self.generations / self.batch_size) * self.iterations

    def __len__(self) -> int:
        return self.steps * self.accumulation * self.batch_size

    def __iter__(self) -> Iterator[int]:
        repeats = self.iterations * self.accumulation
        return (index for batch in self.batches() for _ in range(repeats) for index in batch)

    def batches(self) -> list[list[int]]:
        """The epoch's batches of completions, each a list of the indices of their prompts."""
        prompts = LengthGroupedSampler(self.lengths, self.batch_size // self.generations, self.seed)
        prompts.set_epoch(self.epoch)
        batches = prompts.batches()
        in_order = itertools.cycle([index for batch in batches for index in batch])
        batches[-1] += itertools.islice(in_order, prompts.batch_size - len(batches[-1]))
        return [[index for index in batch for _ in range(self.generations)] for batch in batches]


class DistinctSampler(LengthGroupedSampler):
    """Batches of which none has a text twice, for losses that take the texts of other rows for wrong ones.

    Batches are made as by :class:`LengthGroupedSampler`. A row that has a text of another row of its batch changes
    places with one of another batch, where neither of them has such a text then. Every row is still trained on once in
    an epoch, and the order depends on the seed and the epoch alone.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch, over all accumulation steps.
        seed: the run's seed.
        texts: the texts of each row, each as something that is equal for equal texts.
        forward: rows of a forward, which alone are compared: a whole number of them makes a batch.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, texts: Sequence[frozenset[Hashable]], forward: int
    ) -> None:
        super().__init__(lengths, batch_size, seed)
        self.texts, self.forward = texts, forward

    def batches(self) -> list[list[int]]:
        """The epoch's batches; see :meth:`doubles` for whether they are distinct."""
        order = [index for batch in super().batches() for index in batch]
        parts = self._distinct([order[i : i + self.forward] for i in range(0, len(order), self.forward)])
        order = [index for part in parts for index in part]
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def doubles(self) -> list[int]:
        """The rows of the epoch that have a text of an earlier row of their forward; none where all went well."""
        order = [index for batch in self.batches() for index in batch]
        parts = [order[i : i + self.forward] for i in range(0, len(order), self.forward)]
        return [part[place] for part in parts for place in self._doubled(part)]

    def _doubled(self, part: Sequence[int]) -> list[int]:
        """The places in a forward of rows that have a text of an earlier one."""
        seen: set[Hashable] = set()
        found = []
        for place, index in enumerate(part):
            if seen & self.texts[index]:
                found.append(place)
            seen |= self.texts[index]
        return found

    def _distinct(self, parts: list[list[int]]) -> list[list[int]]:
        held = [Counter(text for index in part for text in self.texts[index]) for part in parts]
        generator = random.Random(f"distinct-{self.seed}-{self.epoch}")
        numbers = range(len(parts))
        for _ in range(_TURNS):
            for number, part in enumerate(parts):
                for place in self._doubled(part):
                    # The first one mostly fits, and to begin anywhere is as good as to shuffle them all.
                    start = generator.randrange(len(parts))
                    others = [other for other in (*numbers[start:], *numbers[:start]) if other != number]
                    self._change_places(parts, held, (number, place), others)
        return parts

    def _change_places(
        self, parts: list[list[int]], held: list[Counter[Hashable]], where: tuple[int, int], others: Sequence[int]
    ) -> None:
        number, place = where
        row = parts[number][place]
        own = self.texts[row]
        without = held[number] - Counter(own)
        for other in others:
            for spot, candidate in enumerate(parts[other]):
                theirs = self.texts[candidate]
                if any(without[text] for text in theirs):
                    continue
                if any(held[other][text] - (text in theirs) for text in own):
                    continue
                parts[number][place], parts[other][spot] = candidate, row
                held[number] = without + Counter(theirs)
                held[other] = held[other] - Counter(theirs) + Counter(own)
                return


def collate(features: Sequence[Mapping[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows, or sequences of packed rows, on the right to the longest.

    What an encoder-decoder reads and what it writes are padded by themselves.

    Args:
        features: ``input_ids`` and ``labels`` of each row; ``position_ids`` too where rows are packed. In the place of
            ``labels``, rows of an encoder-decoder have ``written``: the labels of what its decoder writes.
        pad_token_id: what to pad with; it may equal any other token, since padding is told by position.

    Returns:
        ``input_ids`` and ``labels`` (-100 on padding), each ``(rows, tokens)`` of int64; of the same shape and dtype
        ``position_ids`` where rows are packed, which begin at 0 with the padding as with a row, and otherwise
        ``attention_mask`` (1 on tokens, 0 on padding): transformers takes rows apart only where it is given none. And
        ``predicting``, ``(supervised,)`` of int64: the positions whose next token is supervised, counted through the
        rows one after the other. They are found here, on the host, since a device that finds them has to be waited
        for. Of an encoder-decoder ``labels`` are ``(rows, written tokens)``, and ``predicting`` are the positions of
        supervised labels: a decoder predicts each from the labels before it.
    """
    if "written" in features[0]:
        return _collate_apart(features, pad_token_id)
    longest = max(len(row["input_ids"]) for row in features)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    if "position_ids" in features[0]:
        positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in features]
        told_apart = {"position_ids": torch.tensor(positions)}
    else:
        told_apart = {"attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in features])}
    labels = torch.tensor([padded(row["labels"], IGNORED) for row in features])
    next_is_supervised = torch.zeros_like(labels, dtype=torch.bool)
    next_is_supervised[:, :-1] = labels[:, 1:] != IGNORED
    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_token_id) for row in features]),
        **told_apart,
        "labels": labels,
        "predicting": next_is_supervised.flatten().nonzero().squeeze(1),
    }


def _collate_apart(features: Sequence[Mapping[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The batch of an encoder-decoder; see :func:`collate`."""
    widths = {name: max(len(row[name]) for row in features) for name in ("input_ids", "written")}

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[filler] * (widths[name] - len(row[name]))] for row in features])

    width, labels = widths["input_ids"], padded("written", IGNORED)
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": torch.tensor([[int(at < len(row["input_ids"])) for at in range(width)] for row in features]),
        "labels": labels,
        "predicting": (labels != IGNORED).flatten().nonzero().squeeze(1),
    }


def collate_rows(
    rows: Sequence[EncodedRow], pad_token_id: int, images: ImageProcessor | None = None
) -> dict[str, torch.Tensor]:
    """The batch of some rows, as :func:`collate` makes it, with what the model is given of their images.

    Args:
        rows: the rows, not packed.
        pad_token_id: as there.
        images: reads their pixels; None where no row has images.
    """
    batch = collate([row.features for row in rows], pad_token_id)
    return batch | ({} if images is None else images.tensors([row.images for row in rows], batch["input_ids"]))
