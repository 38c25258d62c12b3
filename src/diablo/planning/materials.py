"""What a plan is made of that is there without torch: the rows that are read, and the tasks that are scored.

It is gathered first. So a fault in the data shows before torch and PEFT are imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from diablo.models.heads import Head
from diablo.planning.labels import find_head
from diablo.planning.rewards import gather_rewards
from diablo.planning.rows import Rows, choose_rows
from diablo.recipes.recipe import Recipe
from diablo.scoring.asking import Decoding, as_multiple_choice, decoding_for
from diablo.scoring.rewards import Rewards
from diablo.tasks import Task, get_task

ScoredTask = tuple[Task, Decoding | None]
"""A task with how its completions are generated; None where its choices are scored by likelihood."""


@dataclass(frozen=True)
class Materials:
    """What is gathered for a plan.

    Attributes:
        scored: the tasks that are scored before and after.
        validated: the tasks whose score on validation problems says which step is best; none where the loss says it.
        rows: the rows, by what they are for.
        rewards: what completions are worth that are written in training; None where none are.
        head: the head that the rows need; None where a language model is trained.
    """

    scored: list[ScoredTask]
    validated: list[ScoredTask]
    rows: Rows
    rewards: Rewards | None = None
    head: Head | None = None


def gather(recipe: Recipe) -> Materials:
    """Read the data of a recipe, without importing torch.

    Raises:
        UserError: a task cannot be scored as it is to be, a source cannot be read, or nothing is left to train on.
    """
    scored = _scored(recipe, recipe.scored)
    rows = choose_rows(recipe, [task for task, _ in scored])
    validated = _scored(recipe, rows.validation_problems) if recipe.training.best_by == "score" else []
    return Materials(scored, validated, rows, gather_rewards(recipe, rows), find_head(recipe, rows))


def _scored(recipe: Recipe, names: Iterable[str]) -> list[ScoredTask]:
    settings = recipe.evaluation
    tasks = [get_task(name, folder=recipe.data.folder, protocol=settings.protocol) for name in names]
    if settings.likelihood:
        return [(as_multiple_choice(task, key="evaluation.likelihood", limit=settings.limit), None) for task in tasks]
    options: dict[str, Any] = {"samples": settings.samples, "temperature": settings.temperature, "seed": recipe.seed}
    return [(task, decoding_for(task, **options)) for task in tasks]
