"""The schedule of a plan's learning rate: transformers' name and options for it, tried before the run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from diablo.errors import UserError, did_you_mean, first_line, shortened
from diablo.recipes.training import Training

# Under which argument a schedule has its floor, and whether that is a share of the learning rate.
_FLOORS = {
    "cosine_with_min_lr": ("min_lr", False),
    "cosine_warmup_with_min_lr": ("min_lr", False),
    "polynomial": ("lr_end", False),
    "warmup_stable_decay": ("min_lr_ratio", True),
}
# Arguments that the recipe says otherwise, or that follow from it.
_WITHHELD = {"optimizer", "num_warmup_steps", "num_training_steps", "num_stable_steps", "last_epoch"}
_WITHHELD |= {"min_lr", "min_lr_rate", "lr_end", "min_lr_ratio"}


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule that is known to take its options.

    Attributes:
        name: as transformers calls it.
        options: its further arguments.
    """

    name: str
    options: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"name": self.name, **self.options}


def choose_schedule(training: Training, steps: int) -> ScheduleChoice:
    """Find the schedule that a recipe asks for, and check what it is told.

    Args:
        training: the recipe's settings.
        steps: optimizer steps of the run.

    Raises:
        UserError: it does not take what it is told, or cannot be had in so many steps.
    """
    name, floor = training.schedule, training.min_learning_rate
    if name == "constant":
        name = "constant_with_warmup"
    elif name == "cosine" and floor is not None:
        name = "cosine_with_min_lr"
    options = dict(training.schedule_options)
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    taken = inspect.signature(function).parameters
    _check_options(training, taken)
    if floor is not None:
        if name not in _FLOORS:
            floored = ", ".join(each.replace("cosine_with_min_lr", "cosine") for each in _FLOORS)
            raise UserError(
                f"training.min_learning_rate: {training.schedule} has no floor; take schedule {floored}, or leave "
                "it out."
            )
        key, is_share = _FLOORS[name]
        options[key] = floor / training.rate if is_share else floor
    elif name == "cosine_warmup_with_min_lr":
        raise UserError("training.schedule: cosine_warmup_with_min_lr needs training.min_learning_rate.")
    if name in ("polynomial", "warmup_stable_decay"):
        spent = training.warmup_steps + (options["num_decay_steps"] if name == "warmup_stable_decay" else 1)
        if spent > steps:
            raise UserError(
                f"training.schedule: {name} cannot be had in {steps} steps with its steps of warmup and decay, which "
                f"are {spent} at least; lower training.warmup_steps or schedule_options, or train longer."
            )
    choice = ScheduleChoice(name, options)
    _try(choice, training, steps)
    return choice


def _check_options(training: Training, taken: Mapping[str, inspect.Parameter]) -> None:
    allowed = [name for name in taken if name not in _WITHHELD]
    for name, value in training.schedule_options.items():
        where = f"training.schedule_options.{name}"
        if name not in allowed:
            listed = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            own = " Its floor is training.min_learning_rate." if name in _WITHHELD and "lr" in name else ""
            raise UserError(
                f"{where}: {training.schedule} has no such option; {listed}.{own or did_you_mean(name, allowed)}"
            )
        is_text = isinstance(taken[name].default, str)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        if not (isinstance(value, str) if is_text else is_number):
            raise UserError(f"{where}: found {shortened(value)}; allowed: {'text' if is_text else 'a number above 0'}.")
    for name in allowed:
        if taken[name].default is inspect.Parameter.empty and name not in training.schedule_options:
            raise UserError(f"training.schedule_options.{name}: missing; {training.schedule} needs it.")


def _try(choice: ScheduleChoice, training: Training, steps: int) -> None:
    """Ask for the rates of a run's first and last step, and of those between its phases."""
    try:
        schedule: Any = get_scheduler(
            choice.name,
            torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.rate),
            num_warmup_steps=training.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(choice.options),
        )
        rates = [schedule.lr_lambdas[0](step) for step in {0, training.warmup_steps, steps // 2, steps - 1}]
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"training.schedule: {training.schedule} does not take its settings: {first_line(error)}"
        ) from None
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise UserError(
            f"training.schedule: {training.schedule} leads to a learning rate that is negative or not finite; check "
            "training.schedule_options."
        )
