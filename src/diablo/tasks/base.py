"""The base class of tasks: rows to train on, and a score for what a model writes."""

from __future__ import annotations

import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.tasks.sources import Source, Split, read_records

Protocol = Literal["strict", "paper"]
PROTOCOLS: tuple[Protocol, ...] = ("strict", "paper")


@dataclass(frozen=True)
class Problem:
    """One problem of a task.

    Attributes:
        row: prompt and completion, as trained on.
        answer: the answer that a right completion gives.
    """

    row: Row
    answer: Any


class Task(ABC):
    """A task: problems by split, how an answer is read from generated text, and when an answer is right.

    The loops over problems live in :mod:`diablo.scoring` and :mod:`diablo.training`. The first paragraph of a
    subclass's docstring is what ``diablo tasks`` says about it.

    Args:
        folder: a local folder of datasets to read in place of the hub.
        protocol: how answers are read: ``"strict"``, or ``"paper"``, as the paper's authors read them.
    """

    name: ClassVar[str]
    source: ClassVar[Source | None] = None
    """Where the records are; None where they are in the package."""
    splits: ClassVar[tuple[Split, ...]] = ("train", "test")
    sizes: ClassVar[tuple[int, ...]] = ()
    """How many records each of the splits has as it is published; empty if that depends on the user's files."""
    licence: ClassVar[str | None] = None
    """The licence of the data, as its publishers state it; None if we know of none."""
    max_new_tokens: ClassVar[int]
    """The most tokens that are generated for an answer."""
    stops_at_newline: ClassVar[bool] = False
    """Whether an answer is one line, so that generation can end with it."""
    beams: ClassVar[int] = 1
    """Beams of the search under the paper's protocol. Under the strict one, generation is greedy or samples."""
    samples: ClassVar[int] = 1
    """The number of completions that are generated for each problem."""
    temperature: ClassVar[float] = 0.0
    """The temperature of sampling; 0 is greedy."""
    runs_code: ClassVar[bool] = False
    """Whether scoring runs code that the model wrote, which the user must have allowed."""
    measure: ClassVar[str] = "share of right answers"
    """What the score measures, in a few words."""
    readings: ClassVar[tuple[str, str]] = ("", "")
    """For each of :data:`PROTOCOLS`, how an answer is read and what makes it right, in a few words."""

    def __init__(self, *, folder: Path | None = None, protocol: Protocol = "strict") -> None:
        self.folder = folder
        self.protocol: Protocol = protocol

    @classmethod
    def is_judged(cls) -> bool:
        """Whether an answer is read and can be right or wrong; where not, the task is only for training."""
        return any(cls.readings)

    @classmethod
    def record(cls) -> dict[str, Any]:
        """All about the task, as values of JSON. The size of a split is None where it depends on the user's files."""
        source = cls.source
        return {
            "task": cls.name,
            "description": inspect.cleandoc(cls.__doc__ or ""),
            "splits": dict(itertools.zip_longest(cls.splits, cls.sizes)),
            "source": source and {"hub": source.hub, "config": source.config, "origin": source.origin},
            "paths": {split: source.paths(split) for split in cls.splits} if source else {},
            "licence": cls.licence,
            "scored": None
            if "test" not in cls.splits
            else {
                "measure": cls.measure,
                "max_new_tokens": cls.max_new_tokens,
                "samples": cls.samples,
                "temperature": cls.temperature,
                "beams_of_paper": cls.beams,
                "runs_code": cls.runs_code,
                "readings": dict(zip(PROTOCOLS, cls.readings, strict=True)),
            },
        }

    @abstractmethod
    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split, in a fixed order."""

    @abstractmethod
    def parse(self, text: str) -> Any | None:
        """The answer that a generated completion gives; None if it gives none, which is never right."""

    @abstractmethod
    def is_right(self, parsed: Any, answer: Any) -> bool:
        """Whether a parsed answer, which is not None, is the right one."""

    def score(self, text: str, problem: Problem) -> bool:
        """Whether a generated completion solves the problem."""
        parsed = self.parse(text)
        return parsed is not None and problem.answer is not None and self.is_right(parsed, problem.answer)

    def score_all(self, texts: Sequence[str], problems: Sequence[Problem]) -> list[bool]:
        """Whether each completion solves the problem at its place. A task that can score several at once does so."""
        return [self.score(text, problem) for text, problem in zip(texts, problems, strict=True)]

    def metrics(self, problems: Sequence[Problem], rights: Sequence[Sequence[bool]]) -> dict[str, float]:
        """The figures of an evaluation, the headline figure first.

        Args:
            problems: what was scored.
            rights: for each problem, whether each of its samples is right.
        """
        verdicts = [right for samples in rights for right in samples]
        return {"accuracy": sum(verdicts) / len(verdicts)}


class RecordTask(Task):
    """A task whose data has one problem in each record."""

    def records(self, split: Split) -> list[tuple[int, dict[str, Any]]]:
        """The records of a split, each with its number from 1."""
        assert self.source is not None
        return read_records(self.source, split, self.folder)

    @abstractmethod
    def problem(self, number: int, record: dict[str, Any]) -> Problem | str:
        """The problem that a record holds, or the reason why this task cannot use its values."""

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split, in the order of the records.

        Raises:
            UserError: there are no records, or one of them is malformed.
        """
        problems = []
        for number, record in self.records(split):
            problem = self.problem(number, record)
            if isinstance(problem, str):
                raise UserError(f"task {self.name}: record {number} of the {split} split is malformed: {problem}.")
            problems.append(problem)
        return problems


class MultipleChoice(Task):
    """A task whose problems list their possible answers, so that it can also be scored by likelihood."""

    @abstractmethod
    def choices(self, problem: Problem) -> list[Row]:
        """The problem's row with each possible completion. Exactly one of them solves the problem."""


def without_tested(train: Sequence[Row], tested: Iterable[Problem]) -> tuple[list[Row], int]:
    """Leave out the training rows whose prompt is, word for word, that of a problem that is tested on.

    So are conversations of one question and one answer whose question is that of a problem.

    Returns:
        The rows that are left, and how many were taken away.
    """
    tested = list(tested)
    prompts = {problem.row.prompt for problem in tested}
    questions = {problem.row.as_messages()[0]["content"] for problem in tested}
    kept = [
        row for row in train if (row.question.strip() not in questions if row.messages else row.prompt not in prompts)
    ]
    return kept, len(train) - len(kept)


_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


def near_copies(train: Iterable[Row], tested: Sequence[Problem]) -> int:
    """How many problems that are tested on ask in the very words of a training row, but for numbers and punctuation.

    What a model scores on them says little of how it does on new problems.
    """
    asked = [
        {_letters(question) for question in (problem.row.prompt, problem.row.as_messages()[0]["content"])} - {b""}
        for problem in tested
    ]
    # Most runs on own rows test nothing, and then no row is read.
    known = set().union(*asked).intersection(_letters(row.question) for row in (train if asked else ()))
    return sum(not known.isdisjoint(letters) for letters in asked)


def _letters(text: str) -> bytes:
    # Half of a surrogate pair is told of as a fault of its row, and not here.
    return text.lower().encode(errors="surrogatepass").translate(None, _NO_LETTERS)
