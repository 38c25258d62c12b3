"""What a comparison will do: the methods at their sizes and the recipe of each run, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from transformers import PretrainedConfig

from diablo.data.general_text import BUILTIN_TEXT
from diablo.errors import UserError, did_you_mean
from diablo.models.loading import meta_model
from diablo.planning.plan import adapt_on_meta, check_quantized, make_plan
from diablo.recipes.applying import Shapes, nearest_size, peft_config, shapes_of
from diablo.recipes.methods import METHODS, AnyMethod, DiabloMethod, FullMethod, LoraMethod, MissMethod
from diablo.recipes.recipe import Recipe
from diablo.recipes.training import Training

DEFAULT_METHODS = tuple(METHODS)
DEFAULT_RATES = (2e-4, 5e-4, 1e-3, 2e-3)

_VALIDATION_SHARE = 10
_MOST_VALIDATION_ROWS = 512

Stage = Literal["validation", "test"]
"""Which rows a run is judged by: ``validation`` chooses the learning rate, ``test`` gives the figures."""


@dataclass(frozen=True)
class Contender:
    """A method at the size at which it is compared.

    Attributes:
        method: the section of the recipe.
        size: N or rank, in words.
        trained: trained parameters.
        deviation: by how much that is more than DiaBlo's, as a share of DiaBlo's; None for full fine-tuning, which has
            no size to choose.
    """

    method: AnyMethod
    size: str
    trained: int
    deviation: float | None

    @property
    def name(self) -> str:
        """The method's name in a recipe."""
        return self.method.name


@dataclass(frozen=True)
class Run:
    """One training run of a comparison.

    Attributes:
        method: the method's name.
        stage: what the run is judged by.
        rate: learning rate.
        seed: seed of the run.
        recipe: what the run is told; its output is a folder of its own.
    """

    method: str
    stage: Stage
    rate: float
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Comparison:
    """A comparison with everything resolved that can be without the model's weights.

    Attributes:
        recipe: the recipe, with DiaBlo as its method.
        folder: where everything is written.
        contenders: the methods at their sizes.
        seeds: the seeds of the runs on the test rows; the first is also the sweep's.
        rates: the grid of learning rates, in ascending order.
        budget: trained parameters of DiaBlo.
        total: parameters of the model.
        steps: optimizer steps of a run.
    """

    recipe: Recipe
    folder: Path
    contenders: list[Contender]
    seeds: list[int]
    rates: list[float]
    budget: int
    total: int
    steps: int

    @property
    def planned_runs(self) -> int:
        """Runs, not counting those by which a grid is extended."""
        return len(self.contenders) * (len(self.rates) + len(self.seeds))

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a comparison to be gone on with, for a JSON file."""
        recipe = self.recipe.model_dump(mode="json")
        # Neither says what a run does: each has a folder and a rate of its own.
        del recipe["output"], recipe["training"]["learning_rate"]
        return {
            "methods": [contender.name for contender in self.contenders],
            "seeds": self.seeds,
            "lrs": self.rates,
            **recipe,
        }

    def run(self, contender: Contender, stage: Stage, rate: float, seed: int) -> Run:
        """The run of a method at a rate with a seed. Both stages train on the same rows."""
        is_test = stage == "test"
        name = f"{contender.name}-{stage}-lr{rate:g}-seed{seed}"
        settings = self.recipe.model_dump()
        settings["method"] = contender.method.model_dump()
        settings["data"]["held_out"] = stage
        settings["training"] |= {"learning_rate": rate, "eval_steps": None, "save_steps": None}
        settings["evaluation"] |= {"before": False, "after": is_test and self.recipe.evaluation.after}
        if not is_test:
            settings["evaluation"]["general"] = None
        settings |= {"seed": seed, "merge": False, "output": self.folder / "runs" / name}
        return Run(contender.name, stage, rate, seed, Recipe.model_validate(settings))


def plan_comparison(
    recipe: Recipe,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: int = 3,
    rates: Sequence[float] = DEFAULT_RATES,
    folder: Path | None = None,
) -> Comparison:
    """Resolve and check a comparison. Config, tokenizer and data are read; models are built on the meta device.

    Args:
        recipe: a recipe whose method is DiaBlo; its size sets the number of trained parameters of the other methods.
            Where it asks for no validation rows, a tenth of the training rows is cut off, at most 512. Where its
            ``evaluation.after`` is false, nothing but losses is compared. Forgetting is measured on its
            ``evaluation.general``, or else on the builtin text.
        methods: names of methods.
        seeds: how many seeds the runs on the test rows have, from the recipe's on.
        rates: the grid of learning rates.
        folder: where to write; the recipe's output with ``-comparison`` behind it where None.

    Raises:
        UserError: something does not fit.
    """
    _check(recipe, methods, seeds, rates)
    folder = folder or recipe.output.with_name(f"{recipe.output.name}-comparison")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {str(folder)!r} is a file; give a folder.")
    settings = recipe.model_dump()
    settings["evaluation"]["general"] = recipe.evaluation.general or BUILTIN_TEXT
    settings["data"]["held_out"] = "test"
    if recipe.data.validation_rows is None:
        rows = len(make_plan(Recipe.model_validate(settings)).train)
        settings["data"]["validation_rows"] = min(_MOST_VALIDATION_ROWS, max(1, rows // _VALIDATION_SHARE))
    recipe = Recipe.model_validate(settings)
    plan = make_plan(recipe)
    check_quantized(recipe, plan.config, methods)
    budget, total = plan.parameters[0], sum(parameter.numel() for parameter in meta_model(plan.config).parameters())
    shapes = shapes_of(plan.targets)
    assert isinstance(recipe.method, DiabloMethod)
    return Comparison(
        recipe=recipe,
        folder=folder,
        contenders=[_contender(name, recipe.method, plan.config, shapes, budget) for name in methods],
        seeds=[recipe.seed + number for number in range(seeds)],
        rates=sorted(rates),
        budget=budget,
        total=total,
        steps=plan.steps,
    )


def parse_rates(text: str) -> list[float]:
    """Learning rates as they are written on the command line, separated by commas.

    Raises:
        UserError: they are no numbers.
    """
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--lrs: found {text!r}; give numbers, separated by commas.") from None


def _check(recipe: Recipe, methods: Sequence[str], seeds: int, rates: Sequence[float]) -> None:
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--methods: found {name!r}; allowed: {', '.join(METHODS)}.{did_you_mean(name, METHODS)}")
    if not methods or len(set(methods)) < len(methods):
        raise UserError(f"--methods: found {', '.join(methods) or 'none'}; name each method once.")
    if seeds < 1:
        raise UserError(f"--seeds: found {seeds}; give an integer of at least 1.")
    # Rates that are written alike would share a folder.
    if (
        not rates
        or len({f"{rate:g}" for rate in rates}) < len(rates)
        or not all(rate > 0 and math.isfinite(rate) for rate in rates)
    ):
        found = ", ".join(f"{rate:g}" for rate in rates) or "none"
        raise UserError(f"--lrs: found {found}; give different numbers above 0.")
    if not isinstance(recipe.method, DiabloMethod):
        raise UserError(
            f"method: found {recipe.method.name}; a comparison takes a recipe of diablo, whose num_blocks sets how "
            "many parameters every method trains. Set method=diablo."
        )
    _check_training(recipe.training)
    if not recipe.scored and recipe.data.eval is None:
        raise UserError(
            "There is nothing to score the methods by: give held-out rows as data.eval, or evaluation.tasks, or a task "
            "that has a test split."
        )


def _check_training(training: Training) -> None:
    """What would be unfair to some method, or would not move with the rates of the sweep."""
    if training.depends_on_held_out:
        raise UserError(
            "training.keep, training.early_stopping_patience: in a comparison they would choose by the rows that a run "
            "is judged by; set training.keep=last and training.early_stopping_patience=null."
        )
    for key, given in (
        ("min_learning_rate", training.min_learning_rate),
        ("optimizer.groups", training.optimizer.groups),
    ):
        if given:
            raise UserError(f"training.{key}: it does not move with the learning rates of a comparison; leave it out.")


def _contender(name: str, diablo: DiabloMethod, config: PretrainedConfig, shapes: Shapes, budget: int) -> Contender:
    """A method with as many trained parameters as DiaBlo has, or as close to that as its ranks come."""
    if name == "diablo":
        return Contender(diablo, f"N = {diablo.num_blocks}", budget, 0.0)
    if name == "full":
        full = FullMethod(name="full")
        return Contender(full, "all weights", adapt_on_meta(full, config)[1][0], None)
    common = diablo.model_dump(include={"target_modules", "exclude_modules", "layers_to_transform", "dropout"})
    meta = meta_model(config)

    def at_rank(rank: int) -> LoraMethod | MissMethod:
        section = MissMethod if name == "miss" else LoraMethod
        return section.model_validate({"name": name, "r": rank, **common})

    def adapter(rank: int) -> PeftConfig:
        return peft_config(at_rank(rank), meta)

    method = at_rank(nearest_size(adapter, shapes, budget))
    trained = adapt_on_meta(method, config)[1][0]
    size = f"r = {method.r}, alpha {method.alpha}" if isinstance(method, LoraMethod) else f"r = {method.r}"
    return Contender(method, size, trained, trained / budget - 1)
