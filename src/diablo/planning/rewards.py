"""The rewards of a recipe, and how completions make up a step; without torch."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from diablo.errors import UserError
from diablo.planning.rows import Rows
from diablo.recipes.recipe import Recipe
from diablo.scoring.rewards import Asked, Own, Rewards, make_reward
from diablo.tasks import get_task

if TYPE_CHECKING:
    from diablo.data.batching import LengthGroupedSampler


def gather_rewards(recipe: Recipe, rows: Rows) -> Rewards | None:
    """Load the rewards of a recipe, and try them out on the first row; None where it has no rewards.

    Raises:
        UserError: one cannot be used, the batch does not hold whole groups of completions, or the engine that is to
            generate them is not installed.
    """
    objective = recipe.objective
    if objective.name != "grpo":
        return None
    if objective.vllm is not None and not find_spec("vllm"):
        raise UserError("objective.vllm: vLLM is not installed; install it with pip install vllm, or leave this out.")
    check_groups(recipe)
    asked: dict[int, Asked] = {}
    for name, problems in rows.problems.items():
        task = get_task(name, folder=recipe.data.folder, protocol=recipe.evaluation.protocol)
        asked |= {id(problem.row): Asked(problem.row, task, problem) for problem in problems}
    rewards = Rewards(
        [make_reward(each.name, each.weight, each.tokens, recipe.max_new_tokens) for each in objective.rewards], asked
    )
    for reward in rewards.each:
        if isinstance(reward, Own):
            reward.try_out(rewards.asked_by(rows.train[0]))
    return rewards


def check_groups(recipe: Recipe, replicas: int | None = None) -> None:
    """Check that the completions of a step are whole groups.

    Args:
        recipe: a recipe whose objective is ``grpo``.
        replicas: processes of which each takes a batch of its own; all that were launched where None.

    Raises:
        UserError: they are not.
    """
    objective, training = recipe.objective, recipe.training
    assert objective.name == "grpo"
    replicas = int(os.environ.get("WORLD_SIZE", "1")) if replicas is None else replicas
    batch = training.batch_size * training.gradient_accumulation * replicas
    if batch % objective.generations:
        several = f" in {replicas} processes" if replicas > 1 else ""
        raise UserError(
            f"training.batch_size: found {training.batch_size}, with gradient_accumulation "
            f"{training.gradient_accumulation}{several}; that is {batch} completions a step, and each prompt gets "
            f"{objective.generations}, which is objective.generations; choose a multiple of {objective.generations}."
        )
    if objective.iterations > 1 and replicas > 1:
        raise UserError(
            f"objective.iterations: found {objective.iterations} in {replicas} processes, whose checkpoints would not "
            "have all completions; set it to 1, or train in one process."
        )


def make_sampler(recipe: Recipe, lengths: list[int], batch: int) -> LengthGroupedSampler:
    """The order of training.

    Args:
        recipe: the recipe.
        lengths: tokens of each sequence or prompt.
        batch: sequences of an optimizer step, or completions of prompts.
    """
    # It needs torch, which nothing above is to wait for.
    from diablo.data.batching import GroupSampler, LengthGroupedSampler

    objective = recipe.objective
    if objective.name != "grpo":
        return LengthGroupedSampler(lengths, batch, recipe.seed)
    accumulation = recipe.training.gradient_accumulation
    return GroupSampler(lengths, batch, recipe.seed, objective.generations, objective.iterations, accumulation)
