"""What of a recipe has to fit together where the model is trained on rewards of its own completions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diablo.errors import UserError
from diablo.recipes.methods import AnyMethod
from diablo.recipes.objectives import GroupObjective
from diablo.recipes.speed import Speed
from diablo.recipes.training import Training
from diablo.scoring.own_functions import file_and_function
from diablo.tasks import TASKS


def check_rewards(objective: GroupObjective, tasks: Sequence[str], max_new_tokens: int) -> None:
    """Check that the rewards can be given.

    Args:
        objective: the objective.
        tasks: the names of the tasks that are trained on.
        max_new_tokens: the most tokens of a completion.

    Raises:
        UserError: a reward means nothing, or its file is not there.
    """
    for name in objective.by_task:
        if not tasks:
            raise UserError(
                f"objective.rewards: {name} is what a task says of an answer, and data.train has none; give task, or a "
                "function of yours, such as my_rewards.py:brevity."
            )
        if unjudged := [task for task in tasks if not TASKS[task].is_judged()]:
            raise UserError(
                f"objective.rewards: {name} is what a task says of an answer, and {unjudged[0]} has no right answers; "
                "leave it out, or take another task."
            )
    for reward in objective.rewards:
        path, _ = file_and_function(reward.name)
        if path and not Path(path).is_file():
            raise UserError(f"objective.rewards: there is no file {path!r}; paths count from the current folder.")
        if reward.tokens is not None and reward.tokens >= max_new_tokens:
            raise UserError(
                f"objective.rewards: length with tokens {reward.tokens} penalises nothing, since a completion has at "
                f"most {max_new_tokens} tokens; lower it, or raise objective.max_new_tokens."
            )


def check_group_training(objective: GroupObjective, training: Training, speed: Speed, max_new_tokens: int) -> None:
    """Check what the optimisation is told.

    Args:
        objective: the objective.
        training: the optimisation.
        speed: what makes a step faster or smaller.
        max_new_tokens: the most tokens of a completion.

    Raises:
        UserError: a setting means nothing with this objective, or leaves no room to prompts.
    """
    if training.neftune_noise_alpha is not None:
        raise UserError(
            f"training.neftune_noise_alpha: found {training.neftune_noise_alpha:g}, which is for objective: sft; leave "
            f"it out with {objective.name}."
        )
    if speed.activation_offloading:
        raise UserError(f"speed.activation_offloading: found true, which {objective.name} does not have; leave it out.")
    if max_new_tokens >= training.max_length:
        raise UserError(
            f"objective.max_new_tokens: found {max_new_tokens}, and training.max_length, which is "
            f"{training.max_length}, is for prompt and completion together; lower the first or raise the second."
        )


def check_group_method(objective: GroupObjective, method: AnyMethod, *, goes_on: bool) -> None:
    """Check that a method can be trained.

    Args:
        objective: the objective.
        method: the method.
        goes_on: whether training goes on from an adapter, whose dropout is then switched off.

    Raises:
        UserError: it would be trained with dropout, or its reference would be a second model.
    """
    dropout = getattr(method, "dropout", 0.0)
    if dropout and not goes_on:
        raise UserError(
            f"method.dropout: found {dropout:g}, and {objective.name} trains on completions of the model as it is; "
            "leave it out."
        )
    if objective.beta and method.name == "full":
        raise UserError(
            f"objective.beta: found {objective.beta:g} with method: full, whose reference would be a second model; set "
            "it to 0, or train an adapter."
        )
