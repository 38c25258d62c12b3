"""Adapters on disk: saving, loading, in which a tensor that does not fit is an error, and conversion."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    MissConfig,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from diablo.data import RowEncoder
from diablo.devices import choose_device, choose_dtype
from diablo.errors import UserError, first_line
from diablo.models.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_folder,
    base_model_of,
    is_adapter,
    new_folder,
    put_in_place,
    read_settings,
)
from diablo.models.heads import Head, check_writes, has_head
from diablo.models.loading import (
    count_parameters,
    is_placed,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)
from diablo.models.stored_weights import write_stop_tokens
from diablo.models.vocabulary import TrainedTokens, give_rows, tokens_of_adapter
from diablo.records.card import write_adapter_facts
from diablo.records.results import recipe_of_run
from diablo.tuner import DiabloConfig, LoraConversion, convert_to_lora
from diablo.tuner.base_digest import digest_on_model, is_same_base
from diablo.tuner.conversion import check_convertible


def save_start(model: Any, folder: Path) -> Path | None:
    """Save what an adapter starts from, where its saved form depends on that, as PiSSA's does.

    Args:
        model: the model, before its first step.
        folder: where to write.

    Returns:
        The folder, for :func:`save_adapter`; None where the method needs none.
    """
    if not (isinstance(model, PeftModel) and _is_pissa(model)):
        return None
    model.save_pretrained(str(folder), **_rows_alone(model))
    return folder


def trains_tokens(model: Any) -> bool:
    """Whether a model has an adapter that trains rows of tokens by themselves."""
    return isinstance(model, PeftModel) and bool(getattr(model.active_peft_config, "trainable_token_indices", None))


def _rows_alone(model: PeftModel) -> dict[str, Any]:
    """What tells PEFT not to save a whole embedding that was resized for new tokens, whose rows it has anyway."""
    return {"save_embedding_layers": False} if trains_tokens(model) else {}


@contextmanager
def saving_rows_alone(model: Any) -> Iterator[None]:
    """Within this context ``save_pretrained`` saves of an embedding the trained rows alone, whoever calls it."""
    if not trains_tokens(model):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, **_rows_alone(model))
    try:
        yield
    finally:
        del model.save_pretrained


def tensors_in_file(model: PeftModel, tensors: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by the names that they have in its file.

    Args:
        model: the adapted model.
        tensors: the tensors to choose from, by the names of the model's parameters; the model's own where None.
    """
    return get_peft_model_state_dict(model, state_dict=tensors, **_rows_alone(model))


def shapes_in_file(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """The shapes of :func:`tensors_in_file`."""
    return {key: tuple(value.shape) for key, value in tensors_in_file(model).items()}


def save_adapter(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    start: Path | None = None,
    trained: Mapping[str, torch.Tensor] | None = None,
    stops: Collection[int] = (),
) -> None:
    """Save an adapter with its model card, or the whole model after full fine-tuning.

    PiSSA has taken its start out of the frozen weights. PEFT saves the difference to that start as plain LoRA of twice
    the rank, so that the adapter fits the base model as it is published. The files are written to a folder beside and
    renamed, so that ``folder`` is never half written.

    Args:
        model: the trained model.
        tokenizer: saved with a whole model, and with an adapter that trains rows of tokens.
        folder: where to write.
        start: what :func:`save_start` returned.
        trained: the trained parameters by name, where the model has them in parts; the model's own where None.
        stops: tokens that stop generation, beside those that the model names; saved with a whole model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        target = Path(scratch) / "saved"
        with_head = Head.of(model.config) is not None
        if isinstance(model, PeftModel):
            model.save_pretrained(
                str(target),
                state_dict=trained,
                path_initial_model_for_weight_conversion=str(start) if start else None,
                **_rows_alone(model),
            )
            if trains_tokens(model):
                tokenizer.save_pretrained(target)
            if not isinstance(model.active_peft_config, DiabloConfig):
                _describe(model, target)
            if with_head:
                # What the head says is in no adapter's own config.
                model.config.save_pretrained(target)
        else:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            if not with_head:
                write_stop_tokens(target, stops)
        put_in_place(target, folder)


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
    if read_settings(adapter).get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
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


def load_for_generation(model: str, *, base: str | None = None, chat: bool | None = None) -> tuple[Any, RowEncoder]:
    """A model, or an adapter on its base, ready to generate, with a run's own settings where it is one's.

    Args:
        model: a run's folder, an adapter's folder, or any model.
        base: the adapter's base model, where it is not the one that the adapter names.
        chat: whether prompts go through the chat template; as the run did where None.

    Returns:
        The model on its device, and the encoder of its prompts.

    Raises:
        UserError: something cannot be loaded.
    """
    check_writes(model, "generate, chat or evaluate")
    loaded, tokenizer = _load_as_trained(model, base)
    trained_as = recipe_of_run(model)
    chat = trained_as.get("chat", False) if chat is None else chat
    special_text = trained_as.get("data", {}).get("special_text", "keep")
    stops = stop_token_ids(loaded.config, loaded.generation_config)
    return loaded, RowEncoder(tokenizer, chat=chat, special_text=special_text, stop_token_ids=stops)


def load_for_labels(model: str, *, base: str | None = None) -> tuple[Any, RowEncoder, Head]:
    """A model with a head, or an adapter with one on its base, ready to label texts.

    Args:
        model: a run's folder, an adapter's folder, or any model.
        base: the adapter's base model, where it is not the one that the adapter names.

    Returns:
        The model on its device, the encoder of its texts, and the head.

    Raises:
        UserError: something cannot be loaded, or the model has no head.
    """
    trained_as = recipe_of_run(model)
    if not (Path(model).is_dir() and has_head(model)) and Head.of(load_config(resolve_model(model))) is None:
        raise UserError(
            f"model: {model!r} writes text and has no head that labels or scores it; ask it with diablo generate, or "
            "give a run of objective classification, regression, reward or token_classification."
        )
    loaded, tokenizer = _load_as_trained(model, base)
    special_text = trained_as.get("data", {}).get("special_text", "keep")
    head = Head.of(loaded.config)
    assert head is not None  # checked above
    is_reward = trained_as.get("objective", {}).get("name") == "reward"
    chat = trained_as.get("chat", False)
    return loaded, RowEncoder(tokenizer, chat=chat, special_text=special_text, has_completions=is_reward), head


def _load_as_trained(model: str, base: str | None) -> tuple[Any, Any]:
    """A model on its device and its tokenizer, with a run's own settings where it is one's."""
    trained_as = recipe_of_run(model)
    device = choose_device()
    precision, attention = trained_as.get("precision", "auto"), trained_as.get("attention", "auto")
    if device.type == "cpu":
        # A run of a GPU is read on a laptop, too, which has neither its kernels nor a use for its fp16.
        precision = "auto" if precision == "fp16" else precision
        attention = attention if attention in ("eager", "sdpa") else "auto"
    dtype, quantization = choose_dtype(precision, device), trained_as.get("quantization")
    if is_adapter(model):
        loaded, tokenizer = load_adapter(
            adapter_folder(model), base=base, dtype=dtype, attention=attention, quantization=quantization
        )
    else:
        name = resolve_model(str(Path(model) / "model") if (Path(model) / "model").is_dir() else model)
        loaded, tokenizer = load_model(name, dtype, attention), load_tokenizer(name)
    loaded = loaded if is_placed(loaded) else loaded.to(device)
    if (chat_template := trained_as.get("chat_template")) is not None:
        tokenizer.chat_template = chat_template
    return loaded, tokenizer


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


def _is_pissa(model: PeftModel) -> bool:
    return str(getattr(model.active_peft_config, "init_lora_weights", "")).startswith("pissa")


def _describe(model: PeftModel, folder: Path) -> None:
    """Write the card of an adapter of a method that does not write its own."""
    config: Any = model.active_peft_config
    trainable, total = count_parameters(model)
    rows = {}
    if isinstance(config, (LoraConfig, MissConfig)):
        rows["rank"] = f"{config.r}, written as LoRA of {2 * config.r}" if _is_pissa(model) else str(config.r)
    elif settings := _settings(config):
        rows["settings"] = settings
    targets = getattr(config, "target_modules", None)
    if targets:
        rows["target modules"] = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    rows["trained parameters"] = f"{trainable:,} of {total:,} ({trainable / total:.2%})"
    write_adapter_facts(folder, str(config.peft_type.value), config.base_model_name_or_path, rows, config.task_type)


def _settings(config: PeftConfig) -> str:
    """The settings of a method: its numbers and choices, without what says where it is applied."""
    known = {each.name for each in dataclasses.fields(PeftConfig)} | {"target_modules", "layers_to_transform"}
    return ", ".join(
        f"{name}: {getattr(value, 'value', value)}"
        for name, value in vars(config).items()
        if name not in known and isinstance(value, (int, float, str)) and not isinstance(value, bool)
    )
