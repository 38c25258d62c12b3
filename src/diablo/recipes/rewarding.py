"""What of a recipe has to fit together where the model is trained on rewards of its own completions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diablo.errors import UserError
from diablo.scoring.own_functions import file_and_function
from diablo.tasks import TASKS

if TYPE_CHECKING:
    from diablo.recipes.recipe import Recipe


def check_group_objective(recipe: Recipe) -> None:
    """Check a recipe whose objective is ``grpo``.

    Raises:
        UserError: a setting means nothing there, or does not fit another one.
    """
    objective = recipe.objective
    assert objective.name == "grpo"
    if recipe.training.neftune_noise_alpha is not None:
        raise UserError(
            "training.neftune_noise_alpha: found a number, which is for objective: sft; leave it out with grpo."
        )
    if recipe.speed.activation_offloading:
        raise UserError("speed.activation_offloading: found true, which grpo does not have; leave it out.")
    dropout = getattr(recipe.method, "dropout", 0.0)
    if dropout and recipe.adapter is None:
        raise UserError(
            f"method.dropout: found {dropout:g}, and grpo trains on completions of the model as it is; leave it out."
        )
    if objective.beta and recipe.method.name == "full":
        raise UserError(
            f"objective.beta: found {objective.beta:g} with method: full, whose reference would be a second model; set "
            "it to 0, or train an adapter."
        )
    _check_rewards(recipe)
    _check_lengths(recipe)


def _check_rewards(recipe: Recipe) -> None:
    objective = recipe.objective
    assert objective.name == "grpo"
    for name in objective.by_task:
        if not recipe.task:
            raise UserError(
                f"objective.rewards: {name} is what a task says of an answer, and data.train has none; give task, or a "
                "function of yours, such as my_rewards.py:brevity."
            )
        if unjudged := [task for task in recipe.task if not TASKS[task].is_judged()]:
            raise UserError(
                f"objective.rewards: {name} is what a task says of an answer, and {unjudged[0]} has no right answers to "
                "judge by; leave it out, or take another task."
            )
    for path, _ in map(file_and_function, (reward.name for reward in objective.rewards)):
        if path and not Path(path).is_file():
            raise UserError(f"objective.rewards: there is no file {path!r}; paths count from the current folder.")


def _check_lengths(recipe: Recipe) -> None:
    objective, most = recipe.objective, recipe.max_new_tokens
    assert objective.name == "grpo"
    if most >= recipe.training.max_length:
        raise UserError(
            f"objective.max_new_tokens: found {most}, and training.max_length, which is {recipe.training.max_length}, "
            "is for prompt and completion together; lower the first or raise the second."
        )
    for reward in objective.rewards:
        if reward.tokens is not None and reward.tokens >= most:
            raise UserError(
                f"objective.rewards: length with tokens {reward.tokens} penalises nothing, since a completion has at "
                f"most {most} tokens; lower it, or raise objective.max_new_tokens."
            )
