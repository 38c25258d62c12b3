"""The plan of a comparison: each method's size and each run's recipe. It is made before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diablo.comparison.grids import Grids, make_grids
from diablo.comparison.names import OFFERED, check_methods, check_optimizers
from diablo.data.general_text import BUILTIN_TEXT
from diablo.errors import UserError
from diablo.planning.materials import gather
from diablo.recipes.methods import DiabloMethod
from diablo.recipes.recipe import Recipe
from diablo.recipes.training import Training

if TYPE_CHECKING:
    from diablo.comparison.contenders import Contender

DEFAULT_METHODS = tuple(OFFERED)

_VALIDATION_SHARE = 10
_MOST_VALIDATION_ROWS = 512

Stage = Literal["validation", "test"]
"""Which rows a run is judged by: ``validation`` chooses the learning rate, ``test`` gives the figures."""


@dataclass(frozen=True)
class Run:
    """One training run of a comparison.

    Attributes:
        method: the contender's title.
        stage: which rows the run is judged by.
        rate: learning rate.
        seed: seed of the run.
        recipe: the run's recipe, with an output folder of its own.
    """

    method: str
    stage: Stage
    rate: float
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Comparison:
    """A comparison, with everything resolved that can be resolved without the model's weights.

    Attributes:
        recipe: the recipe, with DiaBlo as its method.
        folder: where everything is written.
        contenders: the methods at their sizes, each once for every optimizer.
        seeds: the seeds of the runs that are judged on the test rows.
        rate_seeds: the seeds of the runs that choose the learning rate, by their mean loss on the validation rows.
        grids: the learning rates that are tried.
        budget: number of DiaBlo's trained parameters.
        total: number of the model's parameters.
        steps: number of optimizer steps of each run.
    """

    recipe: Recipe
    folder: Path
    contenders: list[Contender]
    seeds: list[int]
    rate_seeds: list[int]
    grids: Grids
    budget: int
    total: int
    steps: int

    @property
    def planned_runs(self) -> int:
        """Number of runs, without the runs that extend a grid of learning rates."""
        tried = [len(self.grids.of(contender.name)) for contender in self.contenders]
        return len(self.rate_seeds) * sum(tried) + len(self.seeds) * len(self.contenders)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, for a JSON file. A comparison goes on in its folder where they are the same, or extended."""
        recipe = self.recipe.model_dump(mode="json")
        optimizers = [contender.optimizer.name for contender in self.contenders if contender.optimizer]
        # These two are left out, since each run has a folder and a rate of its own.
        del recipe["output"], recipe["training"]["learning_rate"]
        return {
            "methods": list(dict.fromkeys(contender.name for contender in self.contenders)),
            "optimizers": list(dict.fromkeys(optimizers)) or None,
            "seeds": self.seeds,
            "rate_seeds": self.rate_seeds,
            "lrs": self.grids.common,
            "own_lrs": self.grids.own,
            **recipe,
        }

    def record(self) -> dict[str, Any]:
        """What will be run, as values of JSON; ``comparison.json`` has the same names for the same."""
        return {
            "folder": str(self.folder),
            "settings": self.settings,
            "budget": self.budget,
            "total_parameters": self.total,
            "steps": self.steps,
            "methods": [
                {
                    "method": contender.name,
                    "settings": contender.method.model_dump(mode="json"),
                    "size": contender.size,
                    "trained_parameters": contender.trained,
                    "deviation_from_budget": contender.deviation,
                }
                for contender in self.contenders
            ],
            "planned_runs": self.planned_runs,
        }

    def run(self, contender: Contender, stage: Stage, rate: float, seed: int) -> Run:
        """The run of a method with a learning rate and a seed.

        Both stages train on the same rows; ``stage`` chooses the rows that the run is judged by.
        """
        is_test = stage == "test"
        name = f"{contender.folder}-{stage}-lr{rate:g}-seed{seed}"
        settings = self.recipe.model_dump()
        settings["method"] = contender.method.model_dump()
        settings["data"]["held_out"] = stage
        settings["training"] |= {"learning_rate": rate, "eval_steps": None, "save_steps": None}
        if contender.optimizer:
            settings["training"]["optimizer"] = contender.optimizer.model_dump()
        settings["evaluation"] |= {"before": False, "after": is_test and self.recipe.evaluation.after}
        if not is_test:
            settings["evaluation"]["general"] = None
        settings |= {"seed": seed, "merge": False, "push_to_hub": None, "output": self.folder / "runs" / name}
        return Run(contender.title, stage, rate, seed, Recipe.model_validate(settings))


def plan_comparison(
    recipe: Recipe,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    optimizers: Sequence[str] | None = None,
    seeds: int = 3,
    rate_seeds: int = 1,
    rates: Sequence[float] | None = None,
    own_rates: Mapping[str, Sequence[float]] | None = None,
    folder: Path | None = None,
) -> Comparison:
    """Resolve and check a comparison. Config, tokenizer and data are read; models are built on the meta device.

    Args:
        recipe: a recipe whose method is DiaBlo. Its N sets the number of trained parameters of the other methods. Where
            it asks for no validation rows, a tenth of the training rows becomes the validation rows, at most 512. Where
            its ``evaluation.after`` is false, only losses are compared. Forgetting is measured on its
            ``evaluation.general``, or on the builtin text where the recipe names none.
        methods: names of the methods to compare, and ``peft:TYPE:KEY`` for one of PEFT's types whose KEY is solved for.
        optimizers: names of the optimizers with each of which every method is run; the recipe's own where None.
        seeds: number of seeds of the runs on the test rows. They count up from the recipe's seed.
        rate_seeds: number of seeds that each learning rate is tried with, counted in the same way. The rate with the
            lowest mean loss is taken.
        rates: the grid of learning rates, for all methods that have none of their own. Where None, it is 2e-4, 5e-4,
            1e-3 and 2e-3, and that of full fine-tuning is a tenth of it.
        own_rates: grids of single methods, by their names in ``methods``.
        folder: where to write; the recipe's output with ``-comparison`` behind it where None.

    Raises:
        UserError: an argument, the recipe, the model or the data does not fit.
    """
    for option, count in (("--seeds", seeds), ("--rate-seeds", rate_seeds)):
        if count < 1:
            raise UserError(f"{option}: found {count}; give an integer of at least 1.")
    grids = _check(recipe, methods, optimizers, rates, own_rates)
    folder = folder or recipe.output.with_name(f"{recipe.output.name}-comparison")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {str(folder)!r} is a file; give a folder.")
    settings = recipe.model_dump()
    if recipe.objective.head is None:
        settings["evaluation"]["general"] = recipe.evaluation.general or BUILTIN_TEXT
    settings["data"]["held_out"] = "test"
    recipe = Recipe.model_validate(settings)
    materials = gather(recipe)
    # They import torch and PEFT, and nothing that is refused above is to wait for that.
    from diablo.comparison.contenders import contender_of, optimizers_of, read_type
    from diablo.models.loading import meta_model
    from diablo.planning.making import make_plan
    from diablo.planning.suited import check_suited
    from diablo.recipes.applying import shapes_of

    for name in methods:
        if name not in OFFERED:
            read_type(name)
    sections = [None] if optimizers is None else optimizers_of(optimizers, recipe.training)
    if recipe.data.validation_rows is None:
        rows = len(make_plan(recipe, materials=materials).train)
        settings["data"]["validation_rows"] = min(_MOST_VALIDATION_ROWS, max(1, rows // _VALIDATION_SHARE))
        recipe = Recipe.model_validate(settings)
        materials = gather(recipe)
    plan = make_plan(recipe, materials=materials)
    total = sum(parameter.numel() for parameter in meta_model(plan.config).parameters())
    # The rows of tokens are the same for every method.
    budget = plan.parameters[0] - sum(kind.parameters for kind in plan.targets if kind.is_rows)
    shapes = shapes_of(plan.targets)
    assert isinstance(recipe.method, DiabloMethod)
    sized = [contender_of(name, recipe.method, plan.config, shapes, budget) for name in methods]
    check_suited(recipe, plan.config, plan.dtype, [contender.method for contender in sized])
    return Comparison(
        recipe=recipe,
        folder=folder,
        contenders=[replace(contender, optimizer=section) for contender in sized for section in sections],
        seeds=[recipe.seed + number for number in range(seeds)],
        rate_seeds=[recipe.seed + number for number in range(rate_seeds)],
        grids=grids,
        budget=budget,
        total=total,
        steps=plan.steps,
    )


def _check(
    recipe: Recipe,
    methods: Sequence[str],
    optimizers: Sequence[str] | None,
    rates: Sequence[float] | None,
    own_rates: Mapping[str, Sequence[float]] | None,
) -> Grids:
    check_methods(methods)
    if optimizers is not None:
        check_optimizers(optimizers)
    grids = make_grids(methods, rates, own_rates)
    if not isinstance(recipe.method, DiabloMethod):
        raise UserError(
            f"method: found {recipe.method.name}; a comparison takes a recipe of diablo, whose num_blocks sets how "
            "many parameters every method trains. Set method=diablo."
        )
    if recipe.adapter is not None:
        raise UserError("adapter: in a comparison every method starts from the base model; leave it out.")
    _check_objective(recipe)
    _check_training(recipe.training)
    if not recipe.scored and recipe.data.eval is None:
        raise UserError(
            "There is nothing to score the methods by: give held-out rows as data.eval, or evaluation.tasks, or a task "
            "that has a test split."
        )
    return grids


def _check_objective(recipe: Recipe) -> None:
    if recipe.objective.name == "grpo":
        raise UserError(
            "objective: found grpo, which has no loss on held-out rows that methods could be compared by; run each "
            "with diablo train."
        )


def _check_training(training: Training) -> None:
    """What would be unfair to some method, or would not move with the rates of the sweep."""
    if training.depends_on_held_out:
        raise UserError(
            "training.keep, training.early_stopping_patience: in a comparison they would choose by the rows that a run "
            "is judged by; set training.keep=last and training.early_stopping_patience=null"
            + (", and training.best_by=loss." if training.best_by == "score" else ".")
        )
    for key, given in (
        ("min_learning_rate", training.min_learning_rate),
        ("optimizer.groups", training.optimizer.groups),
    ):
        if given:
            raise UserError(f"training.{key}: it does not move with the learning rates of a comparison; leave it out.")
