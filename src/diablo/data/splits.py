"""Which rows are trained on, in which order, and which are kept out to choose settings by."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence

from diablo.data.rows import Row
from diablo.errors import UserError


def take_turns(sources: Sequence[Sequence[Row]], weights: Sequence[float] | None = None) -> list[Row]:
    """The rows of several sources in turn, so that the first so many are as many of each, or as their weights say.

    A source that is used up drops out. Row numbers stay those of the sources.

    Args:
        sources: the rows of each source.
        weights: how often each source's rows are taken, which is also how many are taken for each one of a source of
            weight 1: a source of weight 2 gives two rows a turn, and each row twice; one of weight 0.5 gives a row
            every second turn, and the first half of its rows. 1 for each where None.
    """

    def of(index: int, rows: Sequence[Row], weight: float) -> Iterator[tuple[float, int, Row]]:
        for count in range(max(1, round(weight * len(rows))) if rows else 0):
            yield (count + 1) / weight, index, rows[count % len(rows)]

    turns = map(of, range(len(sources)), sources, weights or [1.0] * len(sources))
    return [row for _, _, row in heapq.merge(*turns, key=lambda turn: turn[:2])]


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows, each once, where some of them are there several times."""
    return list({id(row): row for row in rows}.values())


def cut_validation(
    rows: Sequence[Row], count: int, seed: int, key: str = "data.validation_rows"
) -> tuple[list[Row], list[Row]]:
    """Cut validation rows from training rows, by chance.

    A prompt that stands in several rows lies on one side of the cut: rows that share theirs with a validation row are
    neither trained nor validated on.

    Args:
        rows: the training rows; one that is there several times is validated on once.
        count: how many to validate on.
        seed: of the choice.
        key: what the user set to the count, for the message.

    Returns:
        The rows to train on and the rows to validate on, each in their old order.

    Raises:
        UserError: nothing would be left to train on.
    """
    candidates = distinct(rows)
    chosen = set(random.Random(f"validation-{seed}").sample(range(len(candidates)), k=min(count, len(candidates))))
    validation = [row for index, row in enumerate(candidates) if index in chosen]
    prompts = {_prompt(row) for row in validation}
    train = [row for row in rows if _prompt(row) not in prompts]
    if not train:
        raise UserError(
            f"{key}: found {count}; of {len(candidates)} training rows none would be left to train on. Lower it."
        )
    return train, validation


def _prompt(row: Row) -> tuple[str, ...]:
    """What comes before what is trained on; that itself where nothing does, as with a document."""
    turns = [turn["content"] for turn in row.messages[:-1]]
    before = (row.prompt, row.text_pair, *row.words, *turns, *(image.key for image in row.images))
    return before if any(before) else (row.text, row.completion)
