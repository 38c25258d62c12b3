"""The tasks that models are trained and scored on, by name."""

from diablo.errors import UserError
from diablo.tasks.arithmetic import Mawps
from diablo.tasks.base import MultipleChoice, Problem, Task

__all__ = ["TASKS", "MultipleChoice", "Problem", "Task", "get_task"]

TASKS: dict[str, type[Task]] = {"mawps": Mawps}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message lists those that there are.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; allowed: {', '.join(TASKS)}.")
    return TASKS[name]()
