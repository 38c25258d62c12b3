"""Rewards: what a completion that the model writes in training is worth, as the task, a length or the user says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diablo.data.faults import name_places
from diablo.data.rows import Row
from diablo.errors import UserError, did_you_mean
from diablo.scoring.own_functions import OwnFunction, file_and_function
from diablo.tasks import Problem, Task

BY_TASK = ("right_answer", "format")
"""Names of the rewards that a task gives."""

NAMES = (*BY_TASK, "length")
"""Names of all rewards that are there without a file of the user's."""


@dataclass(frozen=True)
class Asked:
    """What was asked of the model.

    Attributes:
        row: the row whose prompt it completes.
        task: the task that the row is of; None where it is the user's own.
        problem: the task's problem.
    """

    row: Row
    task: Task | None = None
    problem: Problem | None = None

    @property
    def is_of_one_line(self) -> bool:
        """Whether a completion ends with its line."""
        return self.task is not None and self.task.stops_at_newline

    @property
    def columns(self) -> dict[str, Any]:
        """What a function of the user's is told of the row beside the prompt."""
        if self.task is None or self.problem is None:
            return dict(self.row.columns)
        return {"task": self.task.name, "completion": self.row.completion, "answer": self.problem.answer}


@dataclass(frozen=True)
class Written:
    """A completion.

    Attributes:
        asked: what it completes.
        text: its text, as it is read where the task is scored.
        tokens: its tokens, without the one that ends it.
    """

    asked: Asked
    text: str
    tokens: Sequence[int]


@dataclass(frozen=True)
class Reward(ABC):
    """A reward.

    Attributes:
        name: what logs call it.
        weight: what its values are multiplied by where rewards are added up.
    """

    name: str
    weight: float

    @abstractmethod
    def __call__(self, written: Sequence[Written]) -> list[float]:
        """A value for each completion.

        Raises:
            UserError: a function of the user's fails, or gives no such values.
        """

    def record(self) -> dict[str, Any]:
        """What it is, as values of JSON."""
        return {"name": self.name, "weight": self.weight}


@dataclass(frozen=True)
class ByTask(Reward):
    """What the task says: with ``right_answer`` 1 where it is solved, with ``format`` where an answer can be read."""

    def __call__(self, written: Sequence[Written]) -> list[float]:
        """1 or 0 for each completion. A task judges all of its completions at once."""
        values = [0.0] * len(written)
        places: dict[str, list[int]] = {}
        for index, each in enumerate(written):
            assert each.asked.task is not None
            places.setdefault(each.asked.task.name, []).append(index)
        for indices in places.values():
            for index, verdict in zip(indices, self._verdicts([written[index] for index in indices]), strict=True):
                values[index] = float(verdict)
        return values

    def _verdicts(self, written: Sequence[Written]) -> list[bool]:
        """The verdicts on completions of one task."""
        task = written[0].asked.task
        assert task is not None
        if self.name == "format":
            return [task.parse(each.text) is not None for each in written]
        problems = [each.asked.problem for each in written if each.asked.problem is not None]
        return task.score_all([each.text for each in written], problems)


@dataclass(frozen=True)
class Length(Reward):
    """A penalty for length: 0 up to some tokens, and from there on ever less, down to -1.

    Attributes:
        tokens: how many tokens cost nothing.
        most: the number of tokens at which it is -1.
    """

    tokens: int
    most: int

    def __call__(self, written: Sequence[Written]) -> list[float]:
        """From -1 to 0 for each completion."""
        return [-min(1.0, max(0, len(each.tokens) - self.tokens) / (self.most - self.tokens)) for each in written]

    def record(self) -> dict[str, Any]:
        """What it is, as values of JSON."""
        return {**super().record(), "tokens": self.tokens}


@dataclass(frozen=True)
class Own(Reward):
    """A function of the user's.

    Attributes:
        function: the function.
    """

    function: OwnFunction

    def __call__(self, written: Sequence[Written]) -> list[float]:
        """What the function gives for each completion."""
        forms = [_in_own_form(each) for each in written]
        keys = dict.fromkeys(key for each in written for key in each.asked.columns)
        return self.function(
            [name_places([each.asked.row]) for each in written],
            prompts=[prompt for prompt, _ in forms],
            completions=[completion for _, completion in forms],
            completion_ids=[list(each.tokens) for each in written],
            **{key: [each.asked.columns.get(key) for each in written] for key in keys},
        )

    def try_out(self, asked: Asked) -> None:
        """Call the function with two completions of a row: its own text, and nothing.

        Raises:
            UserError: it fails, asks for what it is not given, or gives something else than two numbers.
        """
        self.function.check_arguments(["prompts", "completions", "completion_ids", *asked.columns])
        self([Written(asked, asked.row.completion or asked.row.prompt, [0]), Written(asked, "", [])])

    def record(self) -> dict[str, Any]:
        """What it is, with the file and its digest."""
        return {**super().record(), **self.function.record()}


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run.

    Attributes:
        each: the rewards.
        asked: what rows ask, by the ``id`` of the row, for the rows of tasks.
    """

    each: Sequence[Reward]
    asked: Mapping[int, Asked] = field(default_factory=dict)

    def asked_by(self, row: Row) -> Asked:
        """What a row asks."""
        return self.asked.get(id(row)) or Asked(row)

    def written(self, row: Row, text: str, tokens: Sequence[int]) -> Written:
        """A completion of a row.

        Args:
            row: the row.
            text: what was generated, without special tokens.
            tokens: its tokens, without the one that ends it.
        """
        asked = self.asked_by(row)
        if asked.is_of_one_line:
            text = text.partition("\n")[0]
        return Written(asked, text, tokens)

    def total(self, written: Sequence[Written]) -> dict[str, float]:
        """The means over completions: ``reward``, the weighted sum, and each by its name where there are several."""
        means = {reward.name: sum(reward(written)) / len(written) for reward in self.each}
        total = sum(reward.weight * means[reward.name] for reward in self.each)
        return {"reward": total} | ({f"reward_{name}": mean for name, mean in means.items()} if len(means) > 1 else {})

    def record(self) -> list[dict[str, Any]]:
        """What they are, as values of JSON."""
        return [reward.record() for reward in self.each]


def make_reward(name: str, weight: float, tokens: int | None, max_new_tokens: int) -> Reward:
    """A reward by its name.

    Args:
        name: one of :data:`NAMES`, or ``FILE.py:FUNCTION``.
        weight: what its values are multiplied by.
        tokens: for ``length``, how many tokens cost nothing.
        max_new_tokens: the most tokens of a completion.

    Raises:
        UserError: a file or a function of it cannot be used.
    """
    if name in BY_TASK:
        return ByTask(name, weight)
    if name == "length":
        assert tokens is not None
        return Length(name, weight, tokens, max_new_tokens)
    path, function = file_and_function(name)
    return Own(function, weight, OwnFunction(Path(path), function))


def check_reward_name(name: str) -> None:
    """Check that a name is that of a reward, or names a function of a file.

    Raises:
        UserError: it does neither.
    """
    if name not in NAMES and not all(file_and_function(name)):
        raise UserError(
            f"objective.rewards: found {name!r}; allowed: {', '.join(NAMES)}, and a function of a file of yours, such "
            f"as my_rewards.py:brevity.{did_you_mean(name, NAMES)}"
        )


def _in_own_form(written: Written) -> tuple[Any, Any]:
    """Prompt and completion as TRL hands them to a function: text, or turns where the prompt is turns."""
    row = written.asked.row
    if row.messages:
        return list(row.messages[:-1]), [{"role": "assistant", "content": written.text}]
    return row.prompt, written.text
