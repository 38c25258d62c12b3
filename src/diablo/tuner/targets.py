"""Which modules of a model a configuration adapts, worked out and checked before anything is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout
from diablo.tuner.config import DiabloConfig

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The modules that the paper adapts ("qkvud"), by their names in Llama-like models."""


@dataclass(frozen=True)
class Target:
    """A module that a configuration adapts.

    Attributes:
        name: the module's full name in the model.
        layout: the geometry of its blocks.
    """

    name: str
    layout: BlockLayout

    @property
    def kind(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a module that can be adapted; None where it cannot."""
    weight: Any = getattr(module, "weight", None)
    # Quantized layers are often subclasses of nn.Linear, and keep integers or a tensor class of their own.
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or _is_packed(weight):
        return None
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight is of a class that a quantization library defines: its values are not laid out as its shape."""
    return not type(weight).__module__.startswith(("torch.", "diablo")) or type(weight).__module__.startswith(
        "torch.ao"
    )


def default_target_modules(model: nn.Module, model_type: str | None) -> set[str] | str:
    """What ``target_modules=None`` stands for.

    Returns:
        The paper's five projections where the model has them all, and otherwise PEFT's choice for ``model_type``.

    Raises:
        ValueError: neither is known; the message lists the kinds of linear layers that the model has.
    """
    from_peft = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "")
    kinds = linear_kinds(model)
    # An expression confines PEFT's choice to one tower of a multimodal model; plain names would reach into all.
    if not isinstance(from_peft, str) and kinds.keys() >= set(PAPER_TARGETS):
        return set(PAPER_TARGETS)
    if from_peft is None:
        raise ValueError(
            f"target_modules is not given and no default is known for model type {model_type!r}: "
            f"name some of the model's linear layers, {_listed(kinds)}, or 'all-linear'."
        )
    return from_peft if isinstance(from_peft, str) else set(from_peft) & kinds.keys() or set(from_peft)


def linear_kinds(model: nn.Module) -> Counter[str]:
    """How many linear layers the model has of each kind (last part of the name), adapted ones counted once."""
    kinds: Counter[str] = Counter()
    for name, module in modules_outside_adapters(model):
        if linear_shape(base_layer_of(module)) is not None:
            kinds[name.rpartition(".")[2]] += 1
    return kinds


def resolve_targets(model: nn.Module, config: DiabloConfig) -> list[Target]:
    """Work out what ``config`` adapts in ``model``, without changing the model; it may lie on the meta device.

    ``config.target_modules`` must be set; ``"all-linear"`` is replaced in ``config`` by the names that it stands for.

    Raises:
        TypeError: a target is of a kind that cannot be adapted.
        ValueError: nothing matches, a pattern is never used, or ``num_blocks`` does not fit; all faults in one message.
    """
    _maybe_include_all_linear_layers(config, model)
    targets: list[Target] = []
    unsupported: list[str] = []
    bypassed: list[str] = []
    misfits: dict[str, list[str]] = {}
    unused_patterns = set(config.block_pattern)
    for name, module in modules_outside_adapters(model):
        if not check_target_module_exists(config, name):
            continue
        pattern = get_pattern_key(list(config.block_pattern), name)
        unused_patterns.discard(pattern)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            bypassed.append(name)
            continue
        shape = linear_shape(base_layer_of(module))
        if shape is None:
            unsupported.append(f"{name} ({type(base_layer_of(module)).__name__})")
            continue
        num_blocks = config.block_pattern.get(pattern, config.num_blocks)
        if num_blocks > min(shape):
            fault = (
                f"(in_features={shape[0]}, out_features={shape[1]}) takes at most {min(shape)} blocks, not {num_blocks}"
            )
            misfits.setdefault(fault, []).append(name)
            continue
        targets.append(Target(name, BlockLayout(*shape, num_blocks)))
    if unsupported:
        raise TypeError(
            f"DiaBlo adapts nn.Linear and transformers' Conv1D that are not quantized; the target modules "
            f"{config.target_modules!r} also match {_listed(unsupported)}: narrow them or use exclude_modules."
        )
    if bypassed:
        raise TypeError(
            f"{_listed(bypassed)} cannot be adapted: torch's MultiheadAttention and TransformerEncoderLayer read the "
            "weight without calling the layer, so that an adapter would be without effect; narrow target_modules "
            f"{config.target_modules!r} or use exclude_modules."
        )
    if misfits:
        raise ValueError(
            f"num_blocks exceeds a dimension: "
            f"{'; '.join(f'{_and_like(names)}: {fault}' for fault, names in misfits.items())}. "
            "Lower num_blocks, or set block_pattern for these modules."
        )
    if not targets:
        raise ValueError(
            f"The target modules {_as_given(config.target_modules)} match nothing in {type(model).__name__}"
            f"{_after_filters(config)}; its linear layers are {_listed(linear_kinds(model))}."
        )
    if absent := [name for name in _names(config.target_modules) if not matches_any(name, model)]:
        raise ValueError(
            f"target_modules has {_listed(absent)}, which match no module of {type(model).__name__}; its linear layers "
            f"are {_listed(linear_kinds(model))}."
        )
    if unused_patterns:
        raise ValueError(
            f"block_pattern has {_listed(sorted(unused_patterns))}, which match none of the adapted modules; "
            f"these are of the kinds {_listed(Counter(target.kind for target in targets))}."
        )
    return targets


def modules_outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named modules of a model, without the insides of the tuner layers that it may already have."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        found.append((name, module))
    return found


def base_layer_of(module: nn.Module) -> nn.Module:
    """The layer under a module's adapters, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _names(target_modules: Any) -> list[str]:
    """The names of a list of targets; none where it is an expression."""
    return [] if isinstance(target_modules, str) else sorted(target_modules)


def matches_any(target: str, model: nn.Module) -> bool:
    """Whether a name, or end of a name, is that of any module."""
    names = [name for name, _ in modules_outside_adapters(model)]
    return any(name == target or name.endswith(f".{target}") for name in names)


def _as_given(target_modules: Any) -> Any:
    return sorted(target_modules) if isinstance(target_modules, set) else target_modules


def _after_filters(config: DiabloConfig) -> str:
    given = [
        f"{name}={_as_given(getattr(config, name))!r}"
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, name) is not None
    ]
    return f" with {', '.join(given)}" if given else ""


def _and_like(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"


def _listed(items: Any, most: int = 8) -> str:
    names = [str(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
