"""A preview of what a configuration would adapt in a model, and of what it would leave alone and why."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from diablo.tuner.config import DiabloConfig
from diablo.tuner.outside import base_layer_of, modules_outside_adapters
from diablo.tuner.targets import (
    Target,
    default_target_modules,
    other_parameters,
    resolve_targets,
    target_obstacle,
    with_replicated_layers,
)
from diablo.tuner.weights import Owners, module_weight, recomputed


@dataclass(frozen=True)
class Skipped:
    """A module with a weight matrix, or a parameter by itself, that a configuration leaves alone.

    Attributes:
        name: its full name in the model.
        module_type: name of the module's class.
        shape: shape of the weight.
        reason: why it is not adapted.
    """

    name: str
    module_type: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class TargetPreview:
    """The outcome of :func:`preview_targets`. Its ``str`` is a table.

    Attributes:
        targets: what would be adapted, in the model's order.
        skipped: what would be left alone.
        obstacles: by the target's name, why its blocks have to stand beside the weight while they are trained; None
            where they stand in it.
    """

    targets: list[Target]
    skipped: list[Skipped]
    obstacles: dict[str, str | None]

    @property
    def num_parameters(self) -> int:
        """The number of entries of all blocks together."""
        return sum(target.layout.num_parameters for target in self.targets)

    def __str__(self) -> str:
        adapted: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for target in self.targets:
            layout = target.layout
            stored = " x ".join(map(str, layout.blocks_shape))
            sizes = f"{layout.in_features} -> {layout.out_features}"
            obstacle = self.obstacles[target.name]
            where = "in the weight" if obstacle is None else f"beside: {obstacle}"
            adapted[target.kind, sizes, stored, where].append(layout.num_parameters)
        rows: list[tuple[str, ...]] = [("adapted", "in -> out", "blocks", "layers", "parameters", "training")]
        rows += [(*key, str(len(sizes)), f"{sum(sizes):,}", where) for (*key, where), sizes in adapted.items()]
        rows.append(("together", "", "", str(len(self.targets)), f"{self.num_parameters:,}", ""))
        left: dict[tuple[str, ...], int] = defaultdict(int)
        for skipped in self.skipped:
            shape = " x ".join(map(str, skipped.shape))
            left[skipped.name.rpartition(".")[2], shape, skipped.module_type, skipped.reason] += 1
        others: list[tuple[str, ...]] = [("left alone", "weight", "class", "layers", "reason")]
        others += [(kind, shape, type_, str(count), reason) for (kind, shape, type_, reason), count in left.items()]
        return _table(rows) + ("\n\n" + _table(others) if left else "")


def preview_targets(model: nn.Module, config: DiabloConfig) -> TargetPreview:
    """List what a configuration would adapt in a model and what not. Neither model nor configuration is changed.

    Args:
        model: the model, which may lie on the meta device or have adapters already.
        config: the configuration.

    Raises:
        TypeError: a target is of a kind that cannot be adapted.
        ValueError: nothing matches, a name or pattern is never used, or ``num_blocks`` does not fit. Adding the adapter
            raises the same error.
    """
    config = copy.deepcopy(config)
    model = with_replicated_layers(model, config)
    if config.target_modules is None:
        config.target_modules = default_target_modules(
            model, getattr(getattr(model, "config", None), "model_type", None)
        )
    targets = resolve_targets(model, config)
    names = {target.name for target in targets}
    by_themselves = {name: (module, parameter) for name, module, parameter in other_parameters(model)}
    skipped = []
    for name, module in modules_outside_adapters(model):
        base_layer: Any = base_layer_of(module)
        if isinstance(base_layer, AuxiliaryTrainingWrapper):
            base_layer = base_layer.original_module
        shape = _shape(base_layer)
        own = f"{name}.weight" in names or f"{name}.weight" in by_themselves
        if name not in names and not own and len(shape) > 1:
            skipped.append(Skipped(name, type(base_layer).__name__, shape, _reason(config, name, module)))
    for name, (module, parameter) in by_themselves.items():
        if name not in names:
            value = module.get_parameter(parameter)
            skipped.append(Skipped(name, type(module).__name__, tuple(value.shape), "not in target_parameters"))
    owners = Owners(model)
    obstacles = {target.name: target_obstacle(model, target, config, owners) for target in targets}
    return TargetPreview(targets, skipped, obstacles)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a module's weight; empty if it has none. A weight that is computed anew is not computed for this."""
    if (weight := module._parameters.get("weight")) is not None:
        return tuple(weight.shape)
    if recomputed(module):
        with suppress(TypeError):
            return module_weight(module).shape
    return ()


def _reason(config: DiabloConfig, name: str, module: nn.Module) -> str:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return "trained whole by another adapter"
    reasons = {
        "exclude_modules": "left out by exclude_modules",
        "modules_to_save": "trained whole by modules_to_save",
        "layers_to_transform": "left out by layers_to_transform",
    }
    for setting, reason in reasons.items():
        without = copy.copy(config)
        setattr(without, setting, None)
        if check_target_module_exists(without, name):
            return reason
    try:
        module_weight(base_layer_of(module))
    except TypeError:
        return "not supported"
    return "not in target_modules"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
