"""Rows that cannot be used: why, how to mend them, and a report that says each reason once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from diablo.errors import UserError

OPENS_WITH_ANSWER = ("begins with the assistant's turn", "put a turn of the user before it")
"""What is wrong with a conversation that the assistant opens, and how to mend it: there is nothing that it answers."""

_REASONS_LISTED = 5


class Placed(Protocol):
    """What stands somewhere in the data."""

    @property
    def number(self) -> int:
        """Where it stands in its file, from 1."""

    @property
    def source(self) -> str:
        """The name of its file or dataset; empty where there is only one."""


@dataclass(frozen=True)
class Place:
    """Where a row stands, see :class:`Placed`."""

    number: int
    source: str = ""


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be used.

    Attributes:
        number: where the row stands in its file.
        reason: what is wrong with it, the same words for every row that has the same fault.
        mend: what to do about it.
        source: the name of its file or dataset; empty where there is only one.
    """

    number: int
    reason: str
    mend: str
    source: str = ""

    def __str__(self) -> str:
        return f"{_at_the_start(name_places([self]))}: {self.reason}; {self.mend}."


class NoRowError(Exception):
    """What a file has is no row; whoever knows where it stands makes a :class:`RowFault` of it.

    Args:
        reason: what is wrong with it.
        mend: what to do about it.
    """

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.reason, self.mend = reason, mend

    def at(self, number: int) -> RowFault:
        """The fault of the row that has this number in its file."""
        return RowFault(number, self.reason, self.mend)


class RowError(UserError):
    """A single row cannot be used.

    Args:
        fault: which row, and why.
    """

    def __init__(self, fault: RowFault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def name_rows(numbers: Sequence[int], most: int = 3) -> str:
    """Rows by number, as in ``row 3``, ``rows 1, 2 and 5`` or ``rows 1, 2, 5 and 37 more``.

    Args:
        numbers: the rows' numbers, at least one.
        most: how many are named; one more where it would be the only one that is not.
    """
    if len(numbers) > most + 1:
        named, last = numbers[:most], f"{len(numbers) - most} more"
    else:
        named, last = numbers[:-1], str(numbers[-1])
    listed = ", ".join(map(str, named))
    return f"rows {listed} and {last}" if named else f"row {last}"


def name_places(rows: Sequence[Placed]) -> str:
    """Rows by number as :func:`name_rows` has them and, of several files, by file: ``a.jsonl: row 3; b.csv: row 7``."""
    numbers: dict[str, list[int]] = {}
    for row in rows:
        numbers.setdefault(row.source, []).append(row.number)
    return "; ".join(f"{source}: {name_rows(of)}" if source else name_rows(of) for source, of in numbers.items())


def by_reason(faults: Sequence[RowFault]) -> list[tuple[str, RowFault]]:
    """The names of the rows that have a fault, with the first of them, for each reason that there is."""
    groups: dict[tuple[str, str], list[RowFault]] = {}
    for fault in faults:
        groups.setdefault((fault.reason, fault.mend), []).append(fault)
    return [(name_places(group), group[0]) for group in groups.values()]


def explain_faults(faults: Sequence[RowFault]) -> str:
    """A sentence for each reason: which rows, what is wrong with them, and how to mend it."""
    groups = by_reason(faults)
    sentences = [f"{_at_the_start(rows)}: {fault.reason}; {fault.mend}." for rows, fault in groups[:_REASONS_LISTED]]
    if len(groups) > _REASONS_LISTED:
        sentences.append(f"Further reasons, not listed: {len(groups) - _REASONS_LISTED}.")
    return " ".join(sentences)


def _at_the_start(rows: str) -> str:
    """The names of rows at the start of a sentence; the name of a file stays as it is."""
    return rows.capitalize() if rows.startswith("row") and ": " not in rows else rows
