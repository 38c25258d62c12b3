"""Packing: several rows in one sequence, in which no row sees another."""

from __future__ import annotations

import bisect
import random
from collections.abc import Mapping, Sequence

from diablo.data.encoding import IGNORED, EncodedRow


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Choose which rows share a sequence.

    Rows are placed from the longest to the shortest, each into the fullest sequence that still has room for it
    (best-fit decreasing). Rows are never cut.

    Args:
        lengths: tokens of each row, at most ``capacity``.
        capacity: tokens of a sequence.
        seed: decides which of several rows of one length comes first.

    Returns:
        The indices of the rows of each sequence. Every row is in exactly one.
    """
    order = list(range(len(lengths)))
    random.Random(f"packing-{seed}").shuffle(order)
    order.sort(key=lambda index: lengths[index], reverse=True)
    sequences: list[list[int]] = []
    # The room that each sequence has left, in ascending order, with the sequence.
    room: list[tuple[int, int]] = []
    for index in order:
        at = bisect.bisect_left(room, (lengths[index], 0))
        if at == len(room):
            left, sequence = capacity, len(sequences)
            sequences.append([])
        else:
            left, sequence = room.pop(at)
        sequences[sequence].append(index)
        if left > lengths[index]:
            bisect.insort(room, (left - lengths[index], sequence))
    return sequences


def join(rows: Sequence[EncodedRow]) -> dict[str, list[int]]:
    """Put rows one behind the other.

    Args:
        rows: the rows of a sequence.

    Returns:
        ``input_ids``; ``labels``, in which a row's first token carries no loss, since the token before it belongs to
        another row; and ``position_ids``, which begin at 0 with every row. By them transformers tells rows apart.
    """
    return {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in (IGNORED, *row.labels[1:])],
        "position_ids": [position for row in rows for position in range(len(row.input_ids))],
    }


def flatten(sequences: Sequence[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    """Put sequences of packed rows one behind the other, for attention that needs no padding.

    Args:
        sequences: what :func:`join` makes, possibly with other keys.

    Returns:
        One sequence of the same form, without other keys.
    """
    return {
        name: [value for sequence in sequences for value in sequence[name]]
        for name in ("input_ids", "labels", "position_ids")
    }
