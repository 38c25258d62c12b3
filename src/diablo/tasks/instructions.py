"""Tasks that are trained on only: instructions and responses in the format of Alpaca's data."""

from __future__ import annotations

from typing import Any, ClassVar

from diablo.data.rows import instruction_row
from diablo.tasks.base import Problem, RecordTask
from diablo.tasks.sources import Source, Split


class InstructionTask(RecordTask):
    """Instructions, some with an input, and responses.

    No response is the only right one, so there is no test split.
    """

    splits: ClassVar[tuple[Split, ...]] = ("train",)
    max_new_tokens = 512

    def problem(self, number: int, record: dict[str, Any]) -> Problem:
        """The instruction with its input, and the output as the response."""
        row = instruction_row(number, record["instruction"], record["output"], record["input"])
        return Problem(row, record["output"])

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split. Records with an empty output are left out."""
        return [problem for problem in super().problems(split) if problem.answer.strip()]

    def parse(self, text: str) -> str | None:
        """The text without blanks around it."""
        return text.strip() or None

    def is_right(self, parsed: str, answer: str) -> bool:
        """The very same text."""
        return parsed == answer.strip()


def alpaca_source(*places: str, origin: str, hub: str | None = None) -> Source:
    """A source of records in the format of Alpaca's data, to train on."""
    fields = {"instruction": str, "input": str, "output": str}
    return Source(places=places, fields=fields, origin=origin, hub=hub)
