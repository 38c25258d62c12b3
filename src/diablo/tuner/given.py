"""What the keys of a state dict adapt.

PEFT's ``inject_adapter_in_model`` takes its targets from a state dict if it is given one. diffusers loads adapters in
this way.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from diablo.tuner.config import DiabloConfig
from diablo.tuner.outside import base_layer_of, check_not_held, listed, modules_outside_adapters
from diablo.tuner.targets import (
    Target,
    adaptable_parameters,
    fit_targets,
    linear_kinds,
    num_blocks_of,
    unused_patterns,
)

Shape = tuple[int, ...]


def name_before_compiling(name: str) -> str:
    """The name of a module, or a key of a state dict, without what ``torch.compile`` puts in front of it."""
    return name.removeprefix("_orig_mod.")


def targets_given(model: nn.Module, config: DiabloConfig, state_dict: Mapping[str, Any]) -> list[Target]:
    """Work out what the keys of a state dict adapt in ``model``, without changing the model.

    The state dict counts. If its blocks have another N than ``config`` says, or if ``config`` has no
    ``target_modules``, ``config`` is changed to say what the state dict says.

    Args:
        model: the model.
        config: the settings, changed where they differ. They say N where the values of the state dict have no shape.
        state_dict: blocks, each ``(*stack, N, d_in, d_out)``, by their names in the model.

    Raises:
        TypeError: a module of the state dict is of a kind that cannot be adapted.
        ValueError: none of its modules is in the model, its blocks do not fit, or ``config`` has ``target_parameters``,
            which PEFT does not take beside a state dict.
    """
    if config.target_parameters:
        raise ValueError(
            f"target_parameters={config.target_parameters!r} cannot be combined with a state_dict, which PEFT does not "
            "allow: leave them out, since the keys of the state_dict name them, or leave out the state_dict."
        )
    given = _by_module(state_dict)
    asked_by = "the blocks of the state_dict"
    check_not_held(model, given, asked_by)
    candidates: dict[str, str | None] = {}
    shapes: dict[str, Shape] = {}
    for name, module in modules_outside_adapters(model):
        for own, shape in given.pop(name_before_compiling(name), {}).items():
            parameter = own if own in adaptable_parameters(base_layer_of(module)) else None
            target = name if parameter is None else f"{name}.{parameter}"
            candidates[target] = parameter
            if shape is not None:
                shapes[target] = shape
    if not candidates:
        raise ValueError(
            f"The state_dict has keys for {listed(given, 3)}, which match no module of {type(model).__name__}; its "
            f"linear layers are {listed(linear_kinds(model))}, by whose full names the keys have to start."
        )
    targets = fit_targets(model, config, list(candidates.items()), asked_by, shapes)
    # Keys without blocks are those of biases and of modules that are saved whole.
    if strays := [name for name, own in given.items() if any(shape is not None for shape in own.values())]:
        _warn(f"has blocks for {listed(strays, 3)}, which match no module of {type(model).__name__}: they are left out")
    _adjust(config, targets)
    return targets


def _by_module(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Shape | None]]:
    """The shapes of blocks, by the module's name and the last part of the key.

    The last part is a parameter's name if blocks of a parameter are meant.

    Names of modules are read as PEFT reads them.
    """
    found: dict[str, dict[str, Shape | None]] = {}
    for key, value in state_dict.items():
        module, _, kept = name_before_compiling(key).partition(".diablo_blocks")
        shape = tuple(value.shape) if module != name_before_compiling(key) and hasattr(value, "shape") else None
        found.setdefault(module, {})[kept.rpartition(".")[2]] = shape
    return found


def _adjust(config: DiabloConfig, targets: list[Target]) -> None:
    """Change the settings to say what the state dict says."""
    if unused := unused_patterns(config, targets):
        _warn(f"has no blocks for {listed(unused)} of block_pattern, which are left out")
    found = {name_before_compiling(target.name): target.layout.num_blocks for target in targets}
    asked = {name: num_blocks_of(config, name) for name in found}
    other = {name: number for name, number in found.items() if number != asked[name]}
    if other:
        said, meant = (", ".join(map(str, sorted({by_name[name] for name in other}))) for by_name in (asked, found))
        _warn(
            f"has blocks of num_blocks={meant} for {listed(other, 3)}, where the settings say {said}: the state_dict "
            "counts"
        )
        if len(set(found.values())) == 1:
            config.num_blocks, config.block_pattern = next(iter(found.values())), {}
        else:
            config.block_pattern = {re.escape(name): number for name, number in other.items()} | config.block_pattern
    # Without a state dict, a pattern that counts for no target would be an error.
    unused = unused_patterns(config, targets)
    config.block_pattern = {key: value for key, value in config.block_pattern.items() if key not in unused}
    if config.target_modules is None:
        config.target_modules = {name_before_compiling(target.name) for target in targets if target.parameter is None}


def _warn(words: str) -> None:
    # PEFT warns in the same way of targets that the settings and the state dict do not have in common.
    warnings.warn(f"The state_dict {words}.", RuntimeWarning, stacklevel=2)
