"""Adapters from disk: read, checked and put on a base, where a tensor that does not fit is an error; and conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from diablo.errors import UserError, first_line
from diablo.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_model_of,
    new_folder,
    read_settings,
)
from diablo.models.forms import TASKS_OF_HEADS
from diablo.models.heads import Head
from diablo.models.loading import (
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
)
from diablo.models.saving import shapes_in_file, tensors_in_file
from diablo.models.vocabulary import TrainedTokens, give_rows, tokens_of_adapter
from diablo.records.card import write_adapter_facts
from diablo.tuner import LoraConversion, convert_to_lora
from diablo.tuner.base_digest import digest_on_model, is_same_base
from diablo.tuner.conversion import check_convertible


def read_trained(adapter: Path, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of this model, by the names of the model's parameters.

    Args:
        adapter: the adapter's folder.
        model: the adapted model; it may have its parameters in parts.
    """
    named = {name: torch.empty(0) for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {id(tensor): name for name, tensor in named.items()}
    saved = tensors_in_file(model, named)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    return {names[id(tensor)]: tensors[key] for key, tensor in saved.items()}


def read_adapter_config(adapter: Path) -> PeftConfig:
    """The config of an adapter.

    Args:
        adapter: the adapter's folder.

    Raises:
        UserError: it cannot be read, or is not one that PEFT knows.
    """
    settings = read_settings(adapter)
    method, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise UserError(f"{adapter / ADAPTER_CONFIG} names {base!r} as its base model; it takes a folder or a hub id.")
    if not isinstance(method, str):
        raise UserError(f"{adapter / ADAPTER_CONFIG} does not name a method; give the folder that training wrote.")
    try:
        return PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # what PEFT's methods make of values that are none is open-ended
        raise UserError(f"{adapter / ADAPTER_CONFIG} is no config of a {method} adapter: {first_line(error)}") from None


def load_adapter(
    adapter: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    quantization: str | None = None,
) -> tuple[Any, Any]:
    """Load an adapter on its base model. A tensor that is missing, left over or of another shape is an error.

    Args:
        adapter: the adapter's folder.
        base: base model to use in place of the one that the adapter names.
        dtype: dtype of the base weights; as they are stored where None.
        attention: implementation of attention.
        quantization: how the base weights are quantized, as for :func:`diablo.models.loading.load_model`.

    Returns:
        The ``PeftModel`` in evaluation mode and the tokenizer.

    Raises:
        UserError: the files cannot be read or do not fit the base model.
    """
    # What cannot be read shows before the model is loaded.
    read_adapter_config(adapter)
    _shapes_on_disk(adapter)
    name = resolve_model(base or base_model_of(adapter))
    tokens = tokens_of_adapter(adapter, name, load_config(name))
    model = load_base(adapter, name, dtype or stored_dtype(name), attention, quantization)
    tokenizer = load_tokenizer(name) if tokens is None else tokens.tokenizer
    return attach_adapter(model, adapter, name, tokens), tokenizer


def load_base(
    adapter: Path, name: str, dtype: torch.dtype, attention: str = "auto", quantization: str | None = None
) -> Any:
    """The base model of an adapter, with a head that takes the adapter's; see :func:`diablo.models.loading.load_model`.

    Args:
        adapter: the adapter's folder.
        name: a folder or the id of the base model on the hub.
        dtype: dtype of the weights.
        attention: implementation of attention.
        quantization: how the weights are quantized.

    Raises:
        UserError: the weights cannot be loaded, or nothing in the adapter's folder says what its head is.
    """
    if read_settings(adapter).get("task_type") not in TASKS_OF_HEADS:
        return load_model(name, dtype, attention, quantization)
    saved = AutoConfig.from_pretrained(adapter) if (adapter / "config.json").is_file() else None
    if saved is None or (head := Head.of(saved)) is None:
        raise UserError(
            f"{str(adapter)!r} is an adapter with a head, and has no config.json that says which; diablo train writes "
            "one: take it from where the adapter is from."
        )
    config = load_config(name)
    head.put_into(config, saved.get_text_config().pad_token_id)
    return load_model(name, dtype, attention, quantization, config=config)


def attach_adapter(model: Any, adapter: Path, name: str, tokens: TrainedTokens | None) -> PeftModel:
    """Put an adapter on a base model that is loaded; see :func:`load_adapter`.

    Args:
        model: the base model.
        adapter: the adapter's folder.
        name: what the base model is called, for messages.
        tokens: the tokens whose rows the adapter has.

    Returns:
        The ``PeftModel`` in evaluation mode.

    Raises:
        UserError: the files cannot be read or do not fit the base model.
    """
    _shapes_on_disk(adapter)
    config = read_adapter_config(adapter)
    try:
        model = PeftModel.from_pretrained(give_rows(model, tokens), str(adapter), config=config)
        shapes = shapes_in_file(model)
    except Exception as error:  # as above: a config can ask for anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"The adapter {str(adapter)!r} does not fit {name!r}: {' '.join(lines[:3])}") from None
    check_tensors(adapter, name, shapes)
    return model.eval()


def load_values(model: PeftModel, adapter: Path, name: str) -> None:
    """Give an adapter that has just been made the values of one that is saved, to go on training it.

    Args:
        model: the base model with an adapter of the same form.
        adapter: the folder of the saved one.
        name: what the base model is called, for messages.

    Raises:
        UserError: the files cannot be read, do not fit, or were made for other base weights.
    """
    check_tensors(adapter, name, shapes_in_file(model))
    if is_same_base(read_settings(adapter).get("base_digest"), digest_on_model(model)) is False:
        raise UserError(
            f"adapter: {str(adapter)!r} was made for base weights that differ at its targets from those of {name!r}; "
            "set model to the one that it was trained on, in the revision of that time."
        )
    set_peft_model_state_dict(model, load_file(adapter / ADAPTER_WEIGHTS))


def check_tensors(adapter: Path, name: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the file of an adapter has the tensors that it should have, and no others.

    Args:
        adapter: the adapter's folder.
        name: what the base model is called, for messages.
        expected: the shapes by name.

    Raises:
        UserError: a tensor is missing, left over or of another shape, or the file cannot be read.
    """
    saved = _shapes_on_disk(adapter)
    missing, unexpected = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    if missing or unexpected:
        raise UserError(
            f"The adapter {str(adapter)!r} does not fit {name!r}: {_some(missing)} missing, "
            f"{_some(unexpected)} too many."
        )
    if wrong := [key for key, shape in expected.items() if saved[key] != shape]:
        raise UserError(
            f"The adapter {str(adapter)!r} does not fit {name!r}: {_some(wrong[:1])} is {saved[wrong[0]]} and should "
            f"be {expected[wrong[0]]}."
        )


def write_as_lora(adapter: Path, folder: Path, rank: int | float, *, base: str | None = None) -> LoraConversion:
    """Write an adapter as a LoRA adapter, for engines that serve LoRA alone.

    Args:
        adapter: the adapter's folder.
        folder: where to write; it must not exist or be empty, and is never left half written.
        rank: LoRA's rank, or, as a float of at most 1, the share of the squared singular values to keep in each layer.
        base: base model to use in place of the one that the adapter names.

    Returns:
        The conversion, with the error that it makes.

    Raises:
        UserError: the adapter does not fit its base, cannot be converted, or the folder has files.
    """
    try:
        check_convertible(read_adapter_config(adapter))
    except ValueError as error:
        raise UserError(f"The adapter {str(adapter)!r} cannot be converted to LoRA: {error}") from None
    with new_folder(folder, "LoRA adapter") as target:
        model, _ = load_adapter(adapter, base=base)
        try:
            conversion = convert_to_lora(model, rank)
        except (TypeError, ValueError) as error:
            raise UserError(f"The adapter {str(adapter)!r} cannot be converted to LoRA: {error}") from None
        conversion.save_pretrained(target)
        ranks = sorted(set(conversion.ranks.values()))
        rows = {
            "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}, by layer",
            "converted from": "a DIABLO adapter",
            "relative error of the update": f"{conversion.relative_error:.2%}",
        }
        write_adapter_facts(target, "LORA", conversion.config.base_model_name_or_path, rows)
    return conversion


def stored_dtype(name: str) -> torch.dtype:
    """The dtype that a model's config states, fp32 where it states none."""
    dtype = load_config(name).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _shapes_on_disk(adapter: Path) -> dict[str, tuple[int, ...]]:
    path = adapter / ADAPTER_WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{str(adapter)!r} has no {ADAPTER_WEIGHTS}; other formats are not loaded, since they run code."
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}; it is truncated or no safetensors file.") from None


def _some(keys: Any, most: int = 3) -> str:
    # Names come from files: one that could break a line is shown in quotes.
    names = [key if key.isprintable() and key else repr(key) for key in sorted(keys)]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"
