"""Models that are ready to generate or to label, with a run's own settings where they are one's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diablo.data import RowEncoder
from diablo.data.vision import ImageProcessor
from diablo.devices import choose_device, choose_dtype
from diablo.errors import UserError
from diablo.models.adapters import load_adapter
from diablo.models.folders import (
    adapter_folder,
    base_model_of,
    is_adapter,
)
from diablo.models.forms import ENCODER_DECODER, IMAGE_TEXT, check_form, form_of
from diablo.models.heads import Head, check_writes, gives_vectors, has_head
from diablo.models.loading import (
    is_placed,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
)
from diablo.models.vectors import Vectors, load_vectors
from diablo.records.results import recipe_of_run


def load_for_generation(
    model: str,
    *,
    base: str | None = None,
    chat: bool | None = None,
    with_images: bool = False,
    precision: str | None = None,
) -> tuple[Any, RowEncoder]:
    """A model, or an adapter on its base, ready to generate, with a run's own settings where it is one's.

    Args:
        model: a run's folder, an adapter's folder, or any model.
        base: the adapter's base model, where it is not the one that the adapter names.
        chat: whether prompts go through the chat template; as the run did where None.
        with_images: whether prompts have images.
        precision: of the weights, as recipes name it; as the run had it where None.

    Returns:
        The model on its device, and the encoder of its prompts.

    Raises:
        UserError: something cannot be loaded, or the model sees no images and is to, or is an encoder-decoder that sees
            them.
    """
    check_writes(model, "generate, chat or evaluate")
    name = _stored_at(model, base)
    check_form(config := load_config(name))
    if with_images and form_of(config) is not IMAGE_TEXT:
        raise UserError(f"model: {model!r} sees no images; leave --image out, or give a model that does.")
    loaded, tokenizer = _load_as_trained(model, base, precision=precision)
    trained_as = recipe_of_run(model)
    chat = trained_as.get("chat", False) if chat is None else chat
    special_text = trained_as.get("data", {}).get("special_text", "keep")
    stops = stop_token_ids(loaded.config, loaded.generation_config)
    return loaded, RowEncoder(
        tokenizer,
        chat=chat,
        special_text=special_text,
        stop_token_ids=stops,
        images=ImageProcessor(load_processor(name, tokenizer)) if with_images else None,
        encoder_decoder=form_of(loaded.config) == ENCODER_DECODER,
    )


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
    if gives_vectors(model):
        raise UserError(
            f"model: {model!r} gives vectors of texts and labels none; ask it with: diablo embed {model} TEXT"
        )
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


def _stored_at(model: str, base: str | None) -> str:
    """Folder or hub id of the weights that a model, or what an adapter is put on, has."""
    if is_adapter(model):
        return resolve_model(base or base_model_of(adapter_folder(model)))
    return resolve_model(str(Path(model) / "model") if (Path(model) / "model").is_dir() else model)


def load_for_vectors(model: str, *, base: str | None = None) -> tuple[Any, RowEncoder, Vectors]:
    """A model that gives vectors, or an adapter of one on its base.

    Args:
        model: a run's folder, an adapter's folder, or any model without a head, or whose head is not needed.
        base: the adapter's base model, where it is not the one that the adapter names.

    Returns:
        The model on its device, the encoder of its texts, and how they become vectors.

    Raises:
        UserError: something cannot be loaded, or the model was trained for something else.
    """
    trained_as = recipe_of_run(model)
    _check_vectors(model, trained_as)
    loaded, tokenizer = _load_as_trained(model, base, Head("embedding"))
    folder = adapter_folder(model) if is_adapter(model) else _stored_at(model, base)
    special_text = trained_as.get("data", {}).get("special_text", "keep")
    vectors = load_vectors(folder, loaded.config, tokenizer)
    return loaded, RowEncoder(tokenizer, special_text=special_text, has_completions=False), vectors


def _check_vectors(model: str, trained_as: Mapping[str, Any]) -> None:
    """Check that an adapter, or a run, is one of vectors: no other model is put under it, and none is trained so."""
    objective = (trained_as.get("objective") or {}).get("name", "embedding")
    if objective == "embedding" and (gives_vectors(model) or not is_adapter(model)):
        return
    what = f"objective {objective}" if objective != "embedding" else "another objective"
    raise UserError(
        f"model: {model!r} was trained with {what}, and gives no vectors of texts; give a run of objective embedding, "
        "or a model of sentence-transformers or transformers."
    )


def _load_as_trained(
    model: str, base: str | None, head: Head | None = None, *, precision: str | None = None
) -> tuple[Any, Any]:
    """A model on its device and its tokenizer, with a run's own settings where it is one's.

    Of a model that is none of an adapter, a head other than its own may be asked for.
    """
    trained_as = recipe_of_run(model)
    device = choose_device()
    precision = precision or trained_as.get("precision", "auto")
    attention = trained_as.get("attention", "auto")
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
        name = _stored_at(model, base)
        tokenizer, config = load_tokenizer(name), None
        if head is not None:
            config = load_config(name)
            head.put_into(config, tokenizer.pad_token_id)
        loaded = load_model(name, dtype, attention, config=config)
    loaded = loaded if is_placed(loaded) else loaded.to(device)
    if (chat_template := trained_as.get("chat_template")) is not None:
        tokenizer.chat_template = chat_template
    return loaded, tokenizer
