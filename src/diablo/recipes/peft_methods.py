"""Methods of PEFT that a recipe names by their type, with the keys of the method's own config."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from pydantic import TypeAdapter, ValidationError

from diablo.errors import UserError, did_you_mean, first_line, shortened

REFUSED = {
    "ADALORA": "it must be told of every step, and what it has gathered by then is in no checkpoint",
    "CPT": "it wants a type for every token, which rows have not",
    "MULTITASK_PROMPT_TUNING": "it wants the number of a task with every row",
    "POLY": "it wants the number of a task with every row",
    "SHADOW": "it adds a loss of its own, for which it wants the labels of every token",
    "XLORA": "it mixes LoRA adapters that are trained already",
}
"""Types that no recipe can train as they are meant to be trained, and why."""

_OWN_TARGETS = {"ADAPTION_PROMPT", "LN_TUNING", "TRAINABLE_TOKENS"}
"""Types whose targets are no linear layers; PEFT knows which."""

_NOT_MERGED = {
    "BEFT": "its biases have no place in layers without one",
    "LILY": "its layers share factors by what they are given",
}

_ON_QUANTIZED = {"DIABLO", "HIRA", "IA3", "LORA", "MISS", "PVERA", "RANDLORA", "ROAD"}
"""Types that compute with the output of a layer, or know how to read a weight that is quantized."""

_IN_OWN_PRECISION = {"ADAPTION_PROMPT", "LN_TUNING"}

# Fields without a default that would do, and settings that no recipe can make use of.
_NEEDED = ("num_virtual_tokens", "adapter_len", "adapter_layers", "token_indices")
_LEFT_OUT = {
    *("base_digest", "format_version", "megatron_config", "megatron_core", "alora_invocation_tokens"),
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
}
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def peft_type(name: str) -> str:
    """The type of PEFT that a name stands for, in any case.

    Raises:
        UserError: there is none, or no recipe can train it.
    """
    known = [kind.value for kind in PeftType if kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    kind = name.upper()
    allowed = [each for each in known if each not in REFUSED]
    if kind in REFUSED:
        raise UserError(f"method.type: found {kind}, which no recipe trains: {REFUSED[kind]}. Choose another type.")
    if kind not in known:
        raise UserError(
            f"method.type: found {shortened(name)}; allowed: {', '.join(allowed)}.{did_you_mean(kind, allowed)}"
        )
    return kind


def build_config(kind: str, options: Mapping[str, Any], task_type: str = "CAUSAL_LM") -> PeftConfig:
    """PEFT's config of a type, from the keys of a recipe.

    Args:
        kind: what :func:`peft_type` returned.
        options: values by the names of the config's fields, as YAML has them.
        task_type: what PEFT calls the task of the model.

    Raises:
        UserError: a line for each key that the config does not have, for each value of another type, and for each key
            that is missing; or what the config itself refuses.
    """
    allowed = config_keys(kind)
    faults, values = [], {}
    for key, value in options.items():
        if key not in allowed:
            faults.append(
                f"method.{key}: unknown key; allowed: name, type, {', '.join(allowed)}.{did_you_mean(key, allowed)}"
            )
            continue
        try:
            values[key] = TypeAdapter(allowed[key]).validate_python(value)
        except ValidationError:
            faults.append(f"method.{key}: found {shortened(value)}; allowed: {_written(allowed[key])}.")
    faults += [
        f"method.{key}: missing; give {_written(allowed[key])}."
        for key in _NEEDED
        if key in allowed and options.get(key) in (None, [])
    ]
    if kind == "ADAMSS" and values.get("use_asa"):
        faults.append("method.use_asa: found True; allowed: false. It must be told of every step.")
    if kind == "LORA" and values.get("init_lora_weights", True) not in _INITIALISATIONS:
        faults.append(
            f"method.init_lora_weights: found {values['init_lora_weights']!r}; allowed: true, false, gaussian, "
            "orthogonal. The others need data, or change the frozen weights; PiSSA is a method by itself."
        )
    if faults:
        raise UserError("\n".join(faults))
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](task_type=task_type, **values)
    except Exception as error:  # what the configs raise is open-ended
        raise UserError(f"method: {first_line(error)}") from None


def without_defaults(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved config that are not the defaults of its type.

    Args:
        kind: the type, such as ``"LORA"``; any text.
        settings: values by the names of the config's fields, as JSON has them.
    """
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return dict(settings)
    defaults = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]().to_dict()
    return {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}


@functools.cache
def config_keys(kind: str) -> dict[str, Any]:
    """The keys that a recipe may set of a type's config, with the types of their values.

    What PEFT fills in itself is not among them, and neither is what takes a config of its own.
    """
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    hints = typing.get_type_hints(config)
    filled_in = {each.name for each in dataclasses.fields(PeftConfig)} | _LEFT_OUT
    return {
        each.name: hints[each.name]
        for each in dataclasses.fields(config)
        if each.init and each.name not in filled_in and not any(map(dataclasses.is_dataclass, _parts(hints[each.name])))
    }


def size_keys(kind: str) -> list[str]:
    """The keys of a type that take an integer, by which its trained parameters can be solved for."""
    return [
        key
        for key, hint in config_keys(kind).items()
        if int in _parts(hint) and not key.startswith("layers_") and "seed" not in key
    ]


def takes_default_targets(kind: str) -> bool:
    """Whether a type adapts linear layers, so that DiaBlo's default targets are its own where none are given."""
    return kind not in _OWN_TARGETS and "target_modules" in config_keys(kind)


def takes_quantized(kind: str) -> bool:
    """Whether a type can be trained over weights that are quantized."""
    return kind in _ON_QUANTIZED or _is_prompt(kind)


def check_precision(kind: str, dtype: torch.dtype) -> None:
    """Check that what a type trains is fp32 beside frozen weights of a dtype.

    Raises:
        UserError: it is trained in the dtype of the frozen weights, and that is a lower one.
    """
    if kind in _IN_OWN_PRECISION and dtype != torch.float32:
        raise UserError(
            f"precision: {kind} trains in the precision of the frozen weights, {str(dtype).removeprefix('torch.')}, "
            "where updates smaller than a rounding step would be lost; set precision=fp32."
        )


def check_merges(kind: str, what: str) -> None:
    """Check that an adapter of a type can be merged into the weights.

    Args:
        kind: the type, such as ``"LORA"``.
        what: what asks for it, the start of the message.

    Raises:
        UserError: it cannot.
    """
    reason = _NOT_MERGED.get(kind)
    if _is_prompt(kind):
        reason = "what it trains is put before the tokens"
    elif not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(kind)], "merge_and_unload"):
        reason = "what it trains is no part of a weight"
    if reason is not None:
        raise UserError(f"{what}: {kind} cannot be merged into the model: {reason}. Keep the adapter beside the model.")


def check_head(kind: str, objective: str) -> None:
    """Check that a type can be trained beside a new head.

    Raises:
        ValueError: it cannot; with the message for the user.
    """
    if _is_prompt(kind) or "modules_to_save" not in config_keys(kind):
        raise ValueError(
            f"method.type: found {kind}, which trains no module whole, and objective {objective} needs a head that is; "
            "take another type."
        )


def check_packs(kind: str) -> None:
    """Check that a type can be trained on packed rows.

    Raises:
        UserError: it cannot.
    """
    if _is_prompt(kind):
        raise UserError(
            f"training.packing: found true with {kind}, whose prompt is put before a sequence and not before each of "
            "its rows; leave it out, or take another type."
        )


def check_sees(kind: str) -> None:
    """Check that a type can be trained on rows with images.

    Raises:
        UserError: it cannot.
    """
    if _is_prompt(kind):
        raise UserError(
            f"method.type: found {kind}, whose prompt would move the places of images in a row; take another type, or "
            "rows without images."
        )


def _is_prompt(kind: str) -> bool:
    return issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], PromptLearningConfig)


def _parts(hint: Any) -> list[Any]:
    """The types that a union is of, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for each in typing.get_args(hint) for part in _parts(each)]
    return [hint]


def _written(hint: Any) -> str:
    """A type in the words of YAML."""
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    words = []
    for part in _parts(hint):
        if typing.get_origin(part) is typing.Literal:
            words += [str(value) for value in typing.get_args(part)]
        elif typing.get_origin(part) is list:
            words.append("a list")
        elif part is dict or typing.get_origin(part) is dict:
            words.append("a mapping")
        elif isinstance(part, type) and hasattr(part, "__members__"):
            words += [str(member.value) for member in part.__members__.values()]
        else:
            words.append(names.get(part, str(part)))
    return " or ".join(dict.fromkeys(words))
