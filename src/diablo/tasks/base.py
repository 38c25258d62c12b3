"""What a task is: rows to train on, and a score for what a model writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from diablo.data.rows import Row

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Attributes:
        row: prompt and completion, as trained on.
        answer: what a right completion amounts to.
    """

    row: Row
    answer: Any


class Task(ABC):
    """A task: problems by split, how an answer is read from generated text, and when it is right.

    The loops over problems live in :mod:`diablo.evaluation` and :mod:`diablo.training`.
    """

    name: str
    max_new_tokens: int
    """Length of the longest answer that is waited for."""
    stops_at_newline: bool
    """Whether an answer is one line, so that generation can end with it."""

    @abstractmethod
    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split, in a fixed order."""

    @abstractmethod
    def parse(self, text: str) -> Any | None:
        """The answer that a generated completion amounts to; None where it has none, which is never right."""

    @abstractmethod
    def is_right(self, parsed: Any, answer: Any) -> bool:
        """Whether a parsed answer, which is not None, is the right one."""

    def score(self, text: str, problem: Problem) -> bool:
        """Whether a generated completion solves the problem."""
        parsed = self.parse(text)
        return parsed is not None and self.is_right(parsed, problem.answer)


class MultipleChoice(Task):
    """A task whose problems list their possible answers, so that it can also be scored by likelihood."""

    @abstractmethod
    def choices(self, problem: Problem) -> list[Row]:
        """The problem's row with each possible completion; exactly one of them solves the problem."""
