"""Which rows are trained on, in which order, and which are kept out to choose settings by."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest

from diablo.data.rows import Row
from diablo.errors import UserError


def take_turns(sources: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several sources, one of each in turn, so that the first so many are as many of each.

    A source that is used up drops out. Row numbers stay those of the sources.
    """
    return [row for several in zip_longest(*sources) for row in several if row is not None]


def cut_validation(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Cut validation rows from training rows, by chance.

    A prompt that stands in several rows lies on one side of the cut: rows that share theirs with a validation row are
    neither trained nor validated on.

    Args:
        rows: the training rows.
        count: how many to validate on.
        seed: of the choice.

    Returns:
        The rows to train on and the rows to validate on, each in their old order.

    Raises:
        UserError: nothing would be left to train on.
    """
    chosen = set(random.Random(f"validation-{seed}").sample(range(len(rows)), k=min(count, len(rows))))
    validation = [row for index, row in enumerate(rows) if index in chosen]
    prompts = {_prompt(row) for row in validation}
    train = [row for row in rows if _prompt(row) not in prompts]
    if not train:
        raise UserError(
            f"data.validation_rows: found {count}; of {len(rows)} training rows none would be left to train on. "
            "Lower it."
        )
    return train, validation


def _prompt(row: Row) -> tuple[str, ...]:
    return (row.prompt, *(turn["content"] for turn in row.messages[:-1]))
