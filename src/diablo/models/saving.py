"""What the file of an adapter has, and saving adapters and models that were trained whole."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Collection, Generator, Mapping
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
)

from diablo.models.folders import (
    put_in_place,
)
from diablo.models.forms import IMAGE_TEXT, form_of
from diablo.models.heads import Head
from diablo.models.loading import (
    count_parameters,
    write_processor,
)
from diablo.models.stored_weights import write_stop_tokens
from diablo.models.vectors import Vectors
from diablo.records.card import write_adapter_facts
from diablo.tuner import DiabloConfig


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
def saving_rows_alone(model: Any) -> Generator[None]:
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
    source: str | None = None,
    vectors: Vectors | None = None,
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
        source: the model that it was made of, whose processor is saved with a whole model.
        vectors: how texts become vectors, which is saved too, with the tokenizer; None where they do not.
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
            if source is not None:
                write_processor(source, target)
            if not with_head:
                write_stop_tokens(target, stops)
        if vectors is not None:
            vectors.save(target)
            tokenizer.save_pretrained(target)
        put_in_place(target, folder)


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
    sees_images = form_of(model.config) is IMAGE_TEXT
    base, kind = config.base_model_name_or_path, str(config.peft_type.value)
    write_adapter_facts(folder, kind, base, rows, config.task_type, sees_images=sees_images)


def _settings(config: PeftConfig) -> str:
    """The settings of a method: its numbers and choices, without what says where it is applied."""
    known = {each.name for each in dataclasses.fields(PeftConfig)} | {"target_modules", "layers_to_transform"}
    return ", ".join(
        f"{name}: {getattr(value, 'value', value)}"
        for name, value in vars(config).items()
        if name not in known and isinstance(value, (int, float, str)) and not isinstance(value, bool)
    )
