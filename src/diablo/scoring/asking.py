"""How a task is to be scored: by generation, and with which decoding, or by likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diablo.errors import UserError
from diablo.tasks import TASKS, MultipleChoice, Task


@dataclass(frozen=True)
class Decoding:
    """How the completions of an evaluation are generated.

    Attributes:
        samples: number of completions of each problem.
        temperature: temperature of the sampling, which draws from the model's whole distribution. With 0 nothing is
            sampled: decoding is greedy, or a beam search.
        beams: number of beams of the search; 1 is greedy.
        seed: seed of the sampling.
    """

    samples: int = 1
    temperature: float = 0.0
    beams: int = 1
    seed: int = 0

    def describe(self) -> str:
        """The decoding in words."""
        if self.temperature:
            return f"{self.samples} samples at temperature {self.temperature}"
        return f"{self.beams} beams" if self.beams > 1 else "greedy"

    @property
    def options(self) -> dict[str, Any]:
        """The options of transformers' ``generate``."""
        if self.temperature:
            return {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {"do_sample": False, "num_beams": self.beams}


def decoding_for(
    task: Task, *, samples: int | None = None, temperature: float | None = None, seed: int = 0
) -> Decoding:
    """The decoding of a task: what the user asks for, and for the rest what the task asks for.

    Args:
        task: the task. Under the paper's protocol its number of beams is used, unless completions are sampled.
        samples: number of completions of each problem; the task's own number where None.
        temperature: temperature of the sampling; the task's own where None.
        seed: seed of the sampling.

    Raises:
        UserError: several samples at temperature 0, which would all be the same.
    """
    samples = task.samples if samples is None else samples
    temperature = task.temperature if temperature is None else temperature
    if samples > 1 and not temperature:
        raise UserError(
            f"task {task.name}: found {samples} samples at temperature 0, which would all be the same; give a "
            "temperature above 0 (--temperature, in a recipe evaluation.temperature), or 1 sample."
        )
    beams = task.beams if task.protocol == "paper" and not temperature else 1
    return Decoding(samples, temperature, beams, seed)


def as_multiple_choice(task: Task, *, key: str = "--likelihood", limit: int | None = None) -> MultipleChoice:
    """Check that a task can be scored by likelihood, and that its problems list their choices.

    Args:
        task: the task.
        key: the option or key by which the user asked for scoring by likelihood. The error message names it.
        limit: number of problems that will be scored; all where None.

    Returns:
        The task itself.

    Raises:
        UserError: the task's answers are free text, or a problem does not list its choices.
    """
    if not isinstance(task, MultipleChoice):
        allowed = [name for name, kind in TASKS.items() if issubclass(kind, MultipleChoice) and "test" in kind.splits]
        raise UserError(f"{key}: task {task.name!r} has no choices; allowed: {', '.join(allowed)}.")
    for problem in task.problems("test")[:limit]:
        task.choices(problem)
    return task
