"""Which modules of a model a configuration adapts. This is worked out and checked before anything is changed."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import (
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    clone_module,
    replicate_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from diablo.layout import BlockLayout
from diablo.tuner.config import DiabloConfig, config_obstacle
from diablo.tuner.layers.in_place import module_obstacle, parameter_obstacle
from diablo.tuner.layers.quantized import quantization_backend
from diablo.tuner.layers.tensor_parallel import slice_obstacle, slices_of
from diablo.tuner.outside import base_layer_of, check_not_held, held_modules, listed, modules_outside_adapters
from diablo.tuner.weights import (
    SUPPORTED,
    Owners,
    Weight,
    is_distributed,
    linear_shape,
    module_weight,
    parameter_weight,
)

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
"""The modules that the paper adapts ("qkvud"), by their names in Llama-like models."""

ENCODER_DECODER_TARGETS = (
    ("q", "k", "v", "wi", "wo"),
    ("q", "k", "v", "wi_1", "wo"),
    ("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
)
"""The same five by their names in encoder-decoders: in T5; in T5 1.1 and mT5, which have a gate ``wi_0``; in BART."""


@dataclass(frozen=True)
class Target:
    """A module, or a parameter by itself, that a configuration adapts.

    Attributes:
        name: its full name in the model.
        layout: the geometry of its blocks.
        parameter: the parameter's own name where it is adapted by itself; None for a module.
    """

    name: str
    layout: BlockLayout
    parameter: str | None = None

    @property
    def module(self) -> str:
        """Full name of the module, or of the module that holds the parameter."""
        return self.name if self.parameter is None else self.name.removesuffix(f".{self.parameter}")

    @property
    def kind(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def default_target_modules(model: nn.Module, model_type: str | None) -> set[str] | str:
    """What ``target_modules=None`` stands for.

    Returns:
        The paper's five projections if the model has them all, also by the names that they have in encoder-decoders,
        and otherwise PEFT's choice for ``model_type``. Of a model that reads more than text, such as images, it is a
        regular expression that matches in the text part alone.

    Raises:
        ValueError: there is neither. The message lists the kinds of linear layers that the model has.
    """
    from_peft = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "")
    # Where PEFT's choice is an expression, it is confined to one tower of a multimodal model.
    if isinstance(from_peft, str):
        return from_peft
    name, part = text_part(model)
    if name and from_peft is None:
        own: Any = part.config
        from_peft = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(own.model_type)
    kinds = linear_kinds(part)
    has_decoder = getattr(getattr(part, "config", None), "is_encoder_decoder", False)
    known = (PAPER_TARGETS, *(ENCODER_DECODER_TARGETS if has_decoder else ()))
    chosen = next((set(names) for names in known if kinds.keys() >= set(names)), None)
    if chosen is None:
        if from_peft is None:
            raise ValueError(
                f"target_modules is not given and no default is known for model type {model_type!r}: "
                f"name some of the model's linear layers, {listed(kinds)}, or 'all-linear'."
            )
        if isinstance(from_peft, str):
            return from_peft
        chosen = set(from_peft) & kinds.keys() or set(from_peft)
    # Plain names would match in all towers. Where the text part stands differs between classes and versions.
    return rf"(?:.*\.)?{re.escape(name.rpartition('.')[2])}\..*\.(?:{'|'.join(sorted(chosen))})" if name else chosen


def text_part(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that reads text, and its name; the model itself and no name where that is all it reads."""
    text = getattr(getattr(model, "config", None), "text_config", None)
    if not isinstance(text, PretrainedConfig):
        return "", model
    parts = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))
    return next(((name, part) for name, part in parts if name and type(part.config) is type(text)), ("", model))


def sees_images(model: nn.Module) -> bool:
    """Whether a model's class is one of those that transformers makes for texts with images."""
    return bool(text_part(model)[0]) and type(model).__name__ in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()


def linear_kinds(model: nn.Module) -> Counter[str]:
    """How many linear layers the model has of each kind (last part of the name). An adapted layer counts once."""
    kinds: Counter[str] = Counter()
    for name, module in modules_outside_adapters(model):
        if linear_shape(base_layer_of(module)) is not None:
            kinds[name.rpartition(".")[2]] += 1
    return kinds


def resolve_targets(model: nn.Module, config: DiabloConfig) -> list[Target]:
    """Work out what ``config`` adapts in ``model``. The model is not changed, and may lie on the meta device.

    ``config.target_modules`` must be set. In ``config``, ``"all-linear"`` is replaced by the names that it stands for.

    Raises:
        TypeError: a target is of a kind that cannot be adapted.
        ValueError: nothing matches, a pattern is never used, or ``num_blocks`` does not fit. One message names all
            faults.
    """
    held = held_modules(model)
    asked_for = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if config.target_modules is not asked_for:
        # It was "all-linear", and is a set of names now.
        config.target_modules = set(config.target_modules or ()) - held.keys()
    matched = (name for name in held if any(_matches(config, name, model.get_submodule(name))))
    check_not_held(model, matched, _targets_in_words(config))
    targets = fit_targets(model, config, _candidates(model, config), _targets_in_words(config))
    if not targets:
        raise ValueError(
            f"{_targets_in_words(config)} match nothing in {type(model).__name__}{_after_filters(config)}; its linear "
            f"layers are {listed(linear_kinds(model))}{_other_parameters(model)}."
        )
    if absent := [name for name in _names(config.target_modules) if not matches_any(name, model)]:
        raise ValueError(
            f"target_modules has {listed(absent)}, which match no module of {type(model).__name__}; its linear layers "
            f"are {listed(linear_kinds(model))}."
        )
    found = [target.name for target in targets if target.parameter is not None]
    if absent := [name for name in config.target_parameters or () if not _ends_one_of(name, found)]:
        raise ValueError(
            f"target_parameters has {listed(absent)}, which match no parameter of {type(model).__name__}"
            f"{_after_filters(config)}{_other_parameters(model)}."
        )
    if unused := unused_patterns(config, targets):
        raise ValueError(
            f"block_pattern has {listed(unused)}, which match none of the adapted modules; "
            f"these are of the kinds {listed(Counter(target.kind for target in targets))}."
        )
    return targets


def num_blocks_of(config: DiabloConfig, name: str) -> int:
    """The N that ``config`` gives a module or parameter."""
    return config.block_pattern.get(get_pattern_key(list(config.block_pattern), name), config.num_blocks)


def unused_patterns(config: DiabloConfig, targets: Sequence[Target]) -> list[str]:
    """The keys of ``block_pattern`` that decide N for none of the targets."""
    patterns = list(config.block_pattern)
    return sorted(set(patterns) - {get_pattern_key(patterns, target.name) for target in targets})


def fit_targets(
    model: nn.Module,
    config: DiabloConfig,
    candidates: Sequence[tuple[str, str | None]],
    asked_by: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[Target]:
    """Lay out the blocks of modules and parameters.

    Args:
        model: the model.
        config: says into how many blocks each is cut.
        candidates: for each its full name, and for a parameter also its own name (otherwise None).
        asked_by: what asks for them, for messages.
        shapes: shapes of the blocks of some of them, by full name. There the shape counts in place of ``config``.

    Raises:
        TypeError: one is of a kind that cannot be adapted.
        ValueError: ``num_blocks`` or a shape does not fit. One message names all faults.
    """
    targets: list[Target] = []
    unsupported: list[str] = []
    bypassed: list[str] = []
    misfits: dict[str, list[str]] = {}
    for name, parameter in candidates:
        module_name = name if parameter is None else name.removesuffix(f".{parameter}")
        parent = model.get_submodule(module_name.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            bypassed.append(name)
            continue
        try:
            weight = _weight(model, module_name, parameter)
        except TypeError as reason:
            unsupported.append(f"{name} ({reason})")
            continue
        num_blocks = num_blocks_of(config, name)
        shape = shapes.get(name) if shapes else None
        most = min(weight.in_features, weight.out_features)
        nearest = weight.layout(min(num_blocks, most))
        layout = nearest if num_blocks <= most else None
        if shape is not None:
            layout = nearest.with_shape(shape)
        if layout is None:
            fault = f"at most {most} blocks, not {num_blocks}" if shape is None else f"no blocks of the shape {shape}"
            sizes = f"(in_features={weight.in_features}, out_features={weight.out_features})"
            misfits.setdefault(f"{sizes} takes {fault}", []).append(name)
            continue
        targets.append(Target(name, layout, parameter))
    advice = "narrow them or use exclude_modules" if shapes is None else "take its keys out"
    if unsupported:
        raise TypeError(
            f"DiaBlo adapts {SUPPORTED}, linear layers also quantized, and with target_parameters parameters of 2 "
            f"or 3 dimensions; {asked_by} also match {listed(unsupported)}: {advice}."
        )
    if bypassed:
        raise TypeError(
            f"{listed(bypassed)} cannot be adapted: torch's MultiheadAttention and TransformerEncoderLayer read the "
            f"weight without calling the layer, so that an adapter would be without effect; {asked_by} match them: "
            f"{advice}."
        )
    if misfits:
        faults = "; ".join(f"{_and_like(names)}: {fault}" for fault, names in misfits.items())
        if shapes:
            raise ValueError(f"{asked_by} do not fit {type(model).__name__}, {faults}: they are of another model.")
        raise ValueError(
            f"num_blocks exceeds a dimension: {faults}. Lower num_blocks, or set block_pattern for these modules."
        )
    return targets


def with_replicated_layers(model: nn.Module, config: DiabloConfig) -> nn.Module:
    """The model that ``config.layer_replication`` makes, to look at: a copy that shares all tensors.

    Raises:
        ValueError: a range is outside of the model's layers, or the layers cannot be found.
    """
    if not config.layer_replication:
        return model
    copied = clone_module(model, share_weights=True)
    try:
        replicate_layers(copied, config.layer_replication)
    except (IndexError, TypeError):
        raise ValueError(
            f"layer_replication={config.layer_replication!r} must be a list of ranges (first, below last) of the "
            f"model's layers, of which {type(model).__name__} has "
            f"{getattr(getattr(model, 'config', None), 'num_hidden_layers', 'another number')}."
        ) from None
    return copied


def other_parameters(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """The parameters that only ``target_parameters`` can adapt: full name, module and own name of each."""
    return [
        (f"{name}.{parameter}", base_layer_of(module), parameter)
        for name, module in modules_outside_adapters(model)
        for parameter in adaptable_parameters(base_layer_of(module))
    ]


def _candidates(model: nn.Module, config: DiabloConfig) -> list[tuple[str, str | None]]:
    """The modules and parameters that the names in ``config`` match: full name, and a parameter's own name."""
    return [match for name, module in modules_outside_adapters(model) for match in _matches(config, name, module)]


def _matches(config: DiabloConfig, name: str, module: nn.Module) -> Iterator[tuple[str, str | None]]:
    if check_target_module_exists(config, name):
        yield name, None
    if config.target_parameters:
        # PEFT's matching of modules, with its filters, is used for parameters as well.
        parameters = copy.copy(config)
        parameters.target_modules = set(config.target_parameters)
        for parameter, value in base_layer_of(module)._parameters.items():
            full_name = f"{name}.{parameter}"
            if value is not None and check_target_module_exists(parameters, full_name):
                yield full_name, parameter


def _weight(model: nn.Module, module_name: str, parameter: str | None) -> Weight:
    module = model.get_submodule(module_name)
    base_layer = base_layer_of(module)
    if parameter is not None:
        if is_distributed(base_layer._parameters[parameter]):
            raise TypeError("a parameter that is cut over processes or sharded")
        return parameter_weight(base_layer, parameter)
    try:
        quantization_backend(base_layer, model)
        slices_of(model, module_name, base_layer)
        return module_weight(base_layer)
    except TypeError as reason:
        if own := adaptable_parameters(base_layer):
            raise TypeError(f"{reason}; name its {listed(own)} in target_parameters instead") from None
        raise


def adaptable_parameters(module: nn.Module) -> list[str]:
    """The parameters of a module that can be adapted by themselves."""
    names = []
    for name, value in module._parameters.items():
        if value is not None:
            with suppress(TypeError):
                parameter_weight(module, name)
                names.append(name)
    return names


def _ends_one_of(name: str, full_names: list[str]) -> bool:
    return any(full_name == name or full_name.endswith(f".{name}") for full_name in full_names)


def _targets_in_words(config: DiabloConfig) -> str:
    words = []
    if config.target_modules or not config.target_parameters:
        words.append(f"the target modules {_as_given(config.target_modules)!r}")
    if config.target_parameters:
        words.append(f"the target parameters {config.target_parameters!r}")
    return " and ".join(words)


def _other_parameters(model: nn.Module) -> str:
    kinds = Counter(".".join(name.split(".")[-2:]) for name, _, _ in other_parameters(model))
    return f"; parameters that target_parameters takes are {listed(kinds)}" if kinds else ""


def _names(target_modules: Any) -> list[str]:
    """The names of a list of targets; none for an expression."""
    return [] if isinstance(target_modules, str) else sorted(target_modules)


def matches_any(target: str, model: nn.Module) -> bool:
    """Whether any module has this name or a name that ends with it."""
    return _ends_one_of(target, [name for name, _ in modules_outside_adapters(model)])


def _as_given(target_modules: Any) -> Any:
    return sorted(target_modules) if isinstance(target_modules, set) else target_modules


def _after_filters(config: DiabloConfig) -> str:
    given = [
        f"{name}={_as_given(getattr(config, name))!r}{effect}"
        for name, effect in (
            ("exclude_modules", ""),
            ("layers_to_transform", ""),
            ("layers_pattern", ""),
            ("modules_to_save", ", which are trained whole"),
        )
        if getattr(config, name) is not None
    ]
    return f" with {', '.join(given)}" if given else ""


def _and_like(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"


def target_obstacle(model: nn.Module, target: Target, config: DiabloConfig, owners: Owners) -> str | None:
    """Why the blocks of a target have to stand beside its weight; None where they can be written into it.

    Args:
        model: the model.
        target: what is to be adapted.
        config: the adapter's settings.
        owners: the modules that own each of the model's weights.
    """
    module = base_layer_of(model.get_submodule(target.module))
    name = target.parameter or "weight"
    if target.parameter:
        obstacle = parameter_obstacle(module, name)
    elif slices_of(model, target.module, module) is not None:
        obstacle = slice_obstacle(module)
    else:
        obstacle = module_obstacle(module)
    if reason := config_obstacle(config) or obstacle:
        return reason
    sharing = owners.of(module._parameters[name])
    return f"the weight is shared by {', '.join(sharing)}" if len(sharing) > 1 else None
