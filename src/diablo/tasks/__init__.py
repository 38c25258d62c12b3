"""The tasks that models are trained and scored on, by name."""

from __future__ import annotations

from pathlib import Path

from diablo.errors import UserError, did_you_mean
from diablo.tasks import arithmetic, commonsense
from diablo.tasks.base import PROTOCOLS, MultipleChoice, Problem, Protocol, Task, without_tested
from diablo.tasks.sources import Split

__all__ = ["PROTOCOLS", "TASKS", "MultipleChoice", "Problem", "Protocol", "Split", "Task", "get_task", "without_tested"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        arithmetic.Mawps,
        arithmetic.Gsm8k,
        arithmetic.Math,
        arithmetic.MetaMathQA,
        arithmetic.Math10k,
        arithmetic.Svamp,
        arithmetic.MawpsCot,
        arithmetic.Aqua,
        arithmetic.AddSub,
        arithmetic.SingleEq,
        arithmetic.MultiArith,
        commonsense.Commonsense170k,
        commonsense.BoolQ,
        commonsense.Piqa,
        commonsense.SocialIqa,
        commonsense.HellaSwag,
        commonsense.WinoGrande,
        commonsense.ArcEasy,
        commonsense.ArcChallenge,
        commonsense.OpenBookQA,
    )
}


def get_task(name: str, *, folder: Path | None = None, protocol: Protocol = "strict") -> Task:
    """The task of that name.

    Args:
        name: a key of :data:`TASKS`.
        folder: a local folder of datasets to read in place of the hub.
        protocol: how answers are read.

    Raises:
        UserError: there is no such task; the message lists those that there are.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; allowed: {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return TASKS[name](folder=folder, protocol=protocol)
