"""The tasks that models are trained and scored on: their data, and how answers are read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from diablo.errors import UserError, did_you_mean
from diablo.execution import describe_isolation
from diablo.tasks import arithmetic, code, commonsense, safety
from diablo.tasks.base import PROTOCOLS, MultipleChoice, Problem, Protocol, Task, near_copies, without_tested
from diablo.tasks.sources import SPLITS, Split

__all__ = [
    "PROTOCOLS",
    "SPLITS",
    "TASKS",
    "MultipleChoice",
    "Problem",
    "Protocol",
    "Split",
    "Task",
    "check_code_execution",
    "check_split",
    "chosen_tasks",
    "get_task",
    "near_copies",
    "task_class",
    "without_tested",
]

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
        code.CodeAlpaca,
        code.CodeAlpaca2k,
        code.HumanEval,
        safety.SaferPaca,
        safety.SaferPacaSafetyOnly,
        safety.Safety,
        safety.HexPhi,
    )
}


def task_class(name: str) -> type[Task]:
    """The class of the task of that name.

    Raises:
        UserError: there is no such task; the message lists those that there are.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; allowed: {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return TASKS[name]


def get_task(name: str, *, folder: Path | None = None, protocol: Protocol = "strict") -> Task:
    """The task of that name.

    Args:
        name: a key of :data:`TASKS`.
        folder: a local folder of datasets to read in place of the hub.
        protocol: how answers are read.

    Raises:
        UserError: there is no such task; the message lists those that there are.
    """
    return task_class(name)(folder=folder, protocol=protocol)


def check_split(key: str, name: str, split: Split) -> None:
    """Check that there is a task of that name, and that it has the split.

    Args:
        key: the setting or option that holds the name, for the message.
        name: the name.
        split: ``"train"`` to be trained on, ``"test"`` to be scored on.

    Raises:
        UserError: there is no such task, or it lacks the split. The message lists the tasks that have the split.
    """
    allowed = [other for other, task in TASKS.items() if split in task.splits]
    if name not in allowed:
        reason = f", which has no {split} split" if name in TASKS else ""
        raise UserError(f"{key}: found {name!r}{reason}; allowed: {', '.join(allowed)}.{did_you_mean(name, allowed)}")


def check_folder(key: str, folder: Path, names: Collection[str]) -> None:
    """Check a folder of datasets that the user gave.

    Args:
        key: the setting or option that holds the folder, for the message.
        folder: the folder.
        names: the tasks that are to read from it.

    Raises:
        UserError: there is no such folder, or none of the tasks reads from a folder.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: there is no folder {str(folder)!r}; paths count from the current folder.")
    if not any(TASKS[name].source for name in names):
        what = ", ".join(dict.fromkeys(names)) or "data.train"
        raise UserError(f"{key}: found {str(folder)!r}, from which {what} reads nothing; leave it out.")


def check_code_execution(name: str, allowed: bool) -> None:
    """Check that the user has allowed a task to run code, if it needs to.

    Raises:
        UserError: scoring the task runs code that the model wrote, and this was not allowed, or this system cannot
            isolate such code.
    """
    if not TASKS[name].runs_code:
        return
    if not allowed:
        raise UserError(
            f"Task {name!r} runs code that the model wrote; allow it with --allow-code-execution, in a recipe with "
            "evaluation.allow_code_execution: true."
        )
    describe_isolation()


def chosen_tasks(
    trained_as: dict[str, Any],
    names: str | None,
    folder: Path | None,
    protocol: str | None,
    *,
    allow: bool,
    split: Split = "test",
) -> list[Task]:
    """The tasks that the command line asks for, or else those that a run is scored on.

    Args:
        trained_as: the run's recipe; empty if there is no run. Its settings are used where none are given.
        names: names of tasks, separated by commas; None if none are given.
        folder: a local folder of datasets to read in place of the hub.
        protocol: how answers are read.
        allow: whether tasks may run code that the model wrote.
        split: whose problems are answered. With ``"train"`` a run's tasks are those that it was trained on.

    Raises:
        UserError: a task does not exist, or cannot be scored in this way.
    """
    data, evaluation = trained_as.get("data", {}), trained_as.get("evaluation", {})
    own = (split == "test" and evaluation.get("tasks")) or trained_as.get("task", [])
    chosen = [name for name in (names.split(",") if names is not None else own) if name]
    judged = [name for name, task in TASKS.items() if split in task.splits and task.is_judged()]
    if not chosen:
        raise UserError(f"--task: missing; allowed: {', '.join(judged)}.")
    protocol = protocol or evaluation.get("protocol", "strict")
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol: found {protocol!r}; allowed: {', '.join(PROTOCOLS)}.")
    for name in chosen:
        check_split("--task", name, split)
        if name not in judged:
            raise UserError(
                f"--task: found {name!r}, which has no right answers to judge by; allowed: {', '.join(judged)}."
            )
        check_code_execution(name, allow)
    if folder is not None:
        check_folder("--data-folder", folder, chosen)
    own_folder = data.get("folder")
    folder = folder or (Path(own_folder) if own_folder else None)
    return [get_task(name, folder=folder, protocol=protocol) for name in dict.fromkeys(chosen)]
