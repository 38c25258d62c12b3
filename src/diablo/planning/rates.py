"""The learning rate that suits blocks: that of ``auto``, from the weights in memory, and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diablo.errors import UserError
from diablo.layout import Layout
from diablo.models.stored_weights import NoSafetensorsError, StoredWeights
from diablo.planning.plan import Plan
from diablo.recipes.methods import DiabloMethod
from diablo.recipes.named_objective import NamedObjective
from diablo.tuner import DiabloLayer, suggested_learning_rate
from diablo.tuner.rates import FAR_BELOW, gain_of, learning_rate_for

MOST_BYTES = 1 << 30
"""Weights that are read for a plan. Of a larger model as many are read, from all of its depth."""


def with_learning_rate(plan: Plan, model: Any) -> Plan:
    """The plan with the number that ``training.learning_rate: auto`` stands for; as it is where a number is given.

    Args:
        plan: the plan.
        model: the adapted model, with its weights in memory.

    Raises:
        UserError: the weights tell no rate.
    """
    training = plan.recipe.training
    if training.learning_rate != "auto":
        return plan
    try:
        rate = _learning_rate_of(plan, model, plan.steps)
    except ValueError:
        raise UserError(
            "training.learning_rate: found auto, and none of the target modules is a linear layer whose weight can be "
            "read; give a number."
        ) from None
    settled = training.model_copy(update={"learning_rate": rate})
    optimizer = replace(plan.optimizer, arguments={**plan.optimizer.arguments, "lr": rate})
    return replace(plan, recipe=plan.recipe.model_copy(update={"training": settled}), optimizer=optimizer)


def rate_far_above(plan: Plan, model: Any) -> float | None:
    """The rate that suits DiaBlo's blocks, where the plan's is far too low; None where it is not, or is not known.

    Args:
        plan: the plan.
        model: the adapted model, with its weights in memory.
    """
    training = plan.recipe.training
    if not isinstance(plan.recipe.method, DiabloMethod) or not training.moves_by_the_rate:
        return None
    try:
        highest = _learning_rate_of(plan, model, None)
    except ValueError:
        return None
    return _learning_rate_of(plan, model, plan.steps) if training.rate < FAR_BELOW * highest else None


def _learning_rate_of(plan: Plan, model: Any, steps: int | None) -> float:
    """The rate that suits DiaBlo's blocks and the plan's objective.

    Args:
        plan: the plan.
        model: the adapted model, with its weights in memory.
        steps: steps of the run; None for a long one.

    Raises:
        ValueError: the weights tell no rate.
    """
    return share_of(suggested_learning_rate(model, model.active_adapter, steps=steps), plan.recipe.objective)


def share_of(rate: float, objective: NamedObjective) -> float:
    """What suits an objective of a rate that suits supervised training, to two digits."""
    return float(f"{objective.rate_share * rate:.1e}")


def stored_learning_rate(model_name: str, adapted: Any) -> float | None:
    """The rate that suits an adapter in a long run, by its model's files; None where they are not here, or quantized.

    Args:
        model_name: a folder, or a hub id, for which nothing is downloaded.
        adapted: the adapted model on the meta device, whose layers have DiaBlo's blocks or those of another method.

    Raises:
        UserError: a file cannot be read.
    """
    if not Path(model_name).is_dir():
        return None
    try:
        stored = StoredWeights(model_name)
    except NoSafetensorsError:
        return None
    targets: dict[str, tuple[DiabloLayer, Layout]] = {}
    for name, layer in adapted.named_modules():
        file_name = f"{name.removeprefix('base_model.model.')}.weight"
        if isinstance(layer, DiabloLayer) and file_name in stored.files:
            layouts = layer.layouts_of("default")
            if "weight" in layouts and not layouts["weight"].blocks_shape[:-3]:
                targets[file_name] = layer, layouts["weight"]
    names = list(targets)
    size = sum(layer.get_base_layer().get_parameter("weight").nbytes for layer, _ in targets.values())
    names = names[:: 1 + size // MOST_BYTES]
    layers = []
    for name in names:
        layer, layout = targets[name]
        weight = stored.read([name])[name]
        if not torch.is_floating_point(weight):
            return None
        layers.append((layout.blocks_shape[-2], gain_of(layer.weights["weight"].matrix(weight))))
    return learning_rate_for(layers) if layers else None
