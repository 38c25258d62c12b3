"""The methods of a recipe, applied to a model: DiaBlo, and through PEFT the ones it is compared with."""

from __future__ import annotations

import bisect
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, MissConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from diablo.errors import UserError
from diablo.models.loading import count_parameters
from diablo.recipes.methods import AnyMethod, DiabloMethod, FullMethod, LoraMethod, MissMethod
from diablo.tuner import DiabloConfig, DiabloLayer
from diablo.tuner.targets import default_target_modules, linear_kinds, matches_any


@dataclass(frozen=True)
class TargetKind:
    """The adapted modules of one kind.

    Attributes:
        kind: last part of the modules' names.
        count: how many there are.
        shape: ``(in_features, out_features)`` of each.
        adapter: what the adapter holds for each, in words: number and shape of blocks, or shapes of factors.
        parameters: trainable parameters of all of them together.
    """

    kind: str
    count: int
    shape: tuple[int, int]
    adapter: str
    parameters: int


Shapes = Mapping[tuple[int, int], int]
"""How many target layers there are of each ``(in_features, out_features)``."""


def peft_config(method: DiabloMethod | LoraMethod | MissMethod, model: nn.Module) -> PeftConfig:
    """PEFT's configuration for a method; every method's targets default to DiaBlo's, so that they can be compared."""
    targets = method.target_modules
    if targets is None:
        targets = default_target_modules(model, getattr(model.config, "model_type", None))
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(targets) if isinstance(targets, set) else targets,
        "exclude_modules": method.exclude_modules,
        "layers_to_transform": method.layers_to_transform,
    }
    if isinstance(method, DiabloMethod):
        return DiabloConfig(
            num_blocks=method.num_blocks,
            block_pattern=dict(method.block_pattern),
            diablo_dropout=method.dropout,
            **common,
        )
    if isinstance(method, MissMethod):
        return MissConfig(r=method.r, miss_dropout=method.dropout, **common)
    # There are no singular values to find without weights; the shapes are the same.
    if method.name == "pissa" and not any(parameter.is_meta for parameter in model.parameters()):
        common["init_lora_weights"] = "pissa_niter_16"
    return LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        use_rslora=method.name == "rslora",
        use_dora=method.name == "dora",
        **common,
    )


def apply_method(model: Any, method: AnyMethod) -> Any:
    """Make a model trainable by a method. The model may lie on the meta device.

    Returns:
        A ``PeftModel``, or for full fine-tuning the model itself with every parameter trainable.

    Raises:
        UserError: the method does not fit the model; the message names the key of the recipe.
    """
    if isinstance(method, FullMethod):
        return model.requires_grad_(True)
    if isinstance(method.target_modules, list):
        # PEFT's methods pass over a name that matches nothing as long as another one matches.
        absent = [target for target in method.target_modules if not matches_any(target, model)]
        if absent:
            raise UserError(
                f"method.target_modules: {', '.join(absent)} match no module of the model; "
                f"allowed: names of its linear layers ({', '.join(linear_kinds(model))}), or all-linear."
            )
    try:
        adapted = get_peft_model(model, peft_config(method, model))
    except (ValueError, TypeError) as error:
        raise UserError(f"method: {error}") from None
    return adapted


def target_kinds(adapted: nn.Module) -> list[TargetKind]:
    """What a method adapts, grouped by kind, shape and adapter; empty for full fine-tuning."""
    groups: dict[tuple[str, tuple[int, int], str], list[int]] = defaultdict(list)
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            parameters = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            shape = (int(layer.in_features), int(layer.out_features))
            groups[name.rpartition(".")[2], shape, _describe(layer)].append(parameters)
    return [TargetKind(kind, len(sizes), shape, text, sum(sizes)) for (kind, shape, text), sizes in groups.items()]


def shapes_of(kinds: Iterable[TargetKind]) -> Shapes:
    """The shapes of what a method adapts, with how many modules have each."""
    shapes: dict[tuple[int, int], int] = defaultdict(int)
    for kind in kinds:
        shapes[kind.shape] += kind.count
    return shapes


def nearest_size(
    config: Callable[[int], PeftConfig], shapes: Shapes, wanted: int, sizes: Iterable[int] | None = None
) -> int:
    """The size of a method at which its trained parameters come closest to a number.

    Parameters are counted, not computed: one layer of each shape is adapted on the meta device.

    Args:
        config: PEFT's configuration of the method at a size, such as LoRA's at a rank; its targets are not used.
        shapes: the layers that are to be adapted.
        wanted: the number of parameters.
        sizes: the sizes that may be chosen; 1 to the smallest dimension of a layer where None. The number of
            parameters must grow with them, or shrink.

    Returns:
        The size; of two that are equally close, the one with fewer parameters.
    """

    def parameters(size: int) -> int:
        return sum(count * _trained_in_layer(config(size), shape) for shape, count in shapes.items())

    ordered = sorted(range(1, min(map(min, shapes)) + 1) if sizes is None else sizes)
    if parameters(ordered[0]) > parameters(ordered[-1]):
        ordered.reverse()
    above = bisect.bisect_left(ordered, wanted, key=parameters)
    return min(ordered[max(above - 1, 0) : above + 1], key=lambda size: abs(parameters(size) - wanted))


def _trained_in_layer(config: PeftConfig, shape: tuple[int, int]) -> int:
    holder = nn.ModuleDict({"layer": nn.Linear(*shape, bias=False, device="meta")})
    config = copy.copy(config)
    alone = {"target_modules": {"layer"}, "exclude_modules": None, "layers_to_transform": None, "task_type": None}
    vars(config).update(alone)
    with torch.device("meta"):
        return count_parameters(get_peft_model(holder, config))[0]


def _describe(layer: Any) -> str:
    if isinstance(layer, DiabloLayer):
        layout = layer.diablo_layout[layer.active_adapters[0]]
        return f"{layout.num_stored_blocks} blocks of {layout.block_in} x {layout.block_out}"
    ranks = layer.miss_r if hasattr(layer, "miss_r") else layer.r
    return f"rank {ranks[layer.active_adapters[0]]}"
