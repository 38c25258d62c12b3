"""Loading: configs, tokenizers and models, from a folder, the hub or the builtin model."""

from __future__ import annotations

import json
import shutil
import textwrap
import warnings
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GPTQConfig,
    PretrainedConfig,
)
from transformers.utils import cached_file, is_torchvision_available

from diablo.devices import choose_device
from diablo.errors import UserError, first_line, shortened
from diablo.models.builtin import PREFIX, builtin_model
from diablo.models.forms import IMAGE_TEXT, VECTORS, auto_class, form_of
from diablo.models.heads import Head, head_modules, head_paths, initialize, output_parameters
from diablo.models.names import WHAT_TO_GIVE, check_name, check_on_hub, similar_folder
from diablo.tuner.tokens import input_embedding


def resolve_model(model: str) -> str:
    """A name that transformers understands: the folder of a builtin model, anything else as it is."""
    return str(builtin_model(model)) if model.startswith(PREFIX) else model


def load_config(name: str) -> PretrainedConfig:
    """The config alone: nothing else is read or downloaded.

    Raises:
        UserError: there is no such model, or the hub does not answer.
    """
    check_name(name)
    if not Path(name).is_dir():
        check_on_hub(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_cannot_load(name, "config", error)) from None


def load_tokenizer(name: str, chat_template: str | None = None) -> Any:
    """The tokenizer, with a padding token (its end-of-text token where it has none of its own).

    Args:
        name: a folder or the id of a model on the hub.
        chat_template: Jinja that takes the place of the tokenizer's own chat template.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(_cannot_load(name, "tokenizer", error)) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None and (old := _file_of(name, _OLD_TEMPLATE)) is not None:
        with suppress(ValueError, KeyError):
            tokenizer.chat_template = json.loads(old.read_text(encoding="utf-8"))["chat_template"]
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_processor(name: str, tokenizer: Any) -> Any:
    """What makes tokens and tensors of images for a model.

    Args:
        name: a folder or the id of a model on the hub.
        tokenizer: the model's tokenizer, which takes the place of the processor's own.

    Raises:
        UserError: the model has none, or a package that it needs is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(name)
    except ImportError as error:
        needed = " ".join(str(error).split())
        raise UserError(
            f"model: the processor of {name!r} needs a package that is not installed ({shortened(needed)}); install "
            "what it misses with: pip install 'diablo-peft[images]'."
        ) from None
    except (OSError, ValueError, KeyError) as error:
        # Without torchvision transformers may say nothing of it, and complain of what it then looks for instead.
        hint = "" if is_torchvision_available() else _TORCHVISION
        raise UserError(_cannot_load(name, "processor", error) + hint) from None
    if not hasattr(processor, "image_processor"):
        raise UserError(f"model: {name!r} has no processor of images beside its tokenizer; give a model that is whole.")
    processor.tokenizer = tokenizer
    return processor


def write_processor(name: str, folder: Path) -> None:
    """Copy the files of a model's processor beside its tokenizer's, where it has one; files that are there stay.

    Args:
        name: a folder or the id of the model on the hub.
        folder: where the tokenizer is saved.
    """
    if form_of(load_config(name)) is not IMAGE_TEXT:
        return
    for file in _PROCESSOR_FILES:
        if (source := _file_of(name, file)) is not None and not (folder / file).exists():
            shutil.copyfile(source, folder / file)


_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_TORCHVISION = " torchvision, which many processors need, is not installed; try: pip install 'diablo-peft[images]'."
_OLD_TEMPLATE = "chat_template.json"
"""Where processors had their chat template before tokenizers had the same file."""


def _file_of(name: str, file: str) -> Path | None:
    """A file of a model; None where it has none of that name, or the hub does not answer."""
    with suppress(OSError):
        found = cached_file(name, file)
        return None if found is None else Path(found)
    return None


def longest_text(tokenizer: Any, config: PretrainedConfig) -> int | None:
    """The most tokens that a model can read, as its tokenizer and its config say; None where neither does."""
    # A tokenizer that knows of no limit says so by a huge number.
    named = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    known = [limit for limit in named if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)


def load_generation_config(name: str) -> GenerationConfig | None:
    """How a model generates, as its authors say; None where they say nothing that can be read."""
    try:
        return GenerationConfig.from_pretrained(name)
    except (OSError, ValueError, TypeError):
        return None


def stop_token_ids(config: PretrainedConfig, generation: GenerationConfig | None) -> list[int]:
    """The tokens that a model's configs name as the end of a text or turn, each once: none, one or several.

    Args:
        config: the model's config.
        generation: its generation config, which may name more of them.
    """
    ids: list[int] = []
    for settings in (config.get_text_config(), generation):
        named: Any = getattr(settings, "eos_token_id", None)
        ids += [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys(ids))


def load_model(
    name: str,
    dtype: torch.dtype,
    attention: str = "auto",
    quantization: str | None = None,
    *,
    config: PretrainedConfig | None = None,
    seed: int = 0,
) -> Any:
    """The model with its weights, on the CPU; with quantized ones, on the device that is chosen.

    Args:
        name: a folder or the id of a model on the hub.
        dtype: dtype of the weights, or of the products with quantized ones.
        attention: a transformers implementation of attention; ``"auto"`` leaves the choice to transformers.
        quantization: ``"nf4"`` or ``"int8"``: how bitsandbytes quantizes the weights; None leaves them as they are
            stored.
        config: the config to load it with, which may name another head than the stored one; the stored one where None.
        seed: of the first values of a head that the stored weights do not have.

    Raises:
        UserError: the weights cannot be loaded, or the attention or the quantization is not available.
    """
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    stored = load_config(name)
    if (settings := _quantization_config(name, stored, dtype, quantization)) is not None:
        if quantization is not None and config is not None and Head.of(config) is not None:
            # It is trained whole.
            settings.llm_int8_skip_modules = head_paths(meta_model(config))
        options |= {"quantization_config": settings, "device_map": {"": choose_device()}}
    try:
        with warnings.catch_warnings():
            # That nothing but the kernel is taken from the settings which are given here.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            if config is None or (head := Head.of(config)) is None:
                return _without_pooler(auto_class(stored).from_pretrained(name, dtype=dtype, **options))
            model, info = auto_class(config).from_pretrained(
                name, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(_cannot_load(name, "weights", error)) from None
    lost = {*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])}
    parameters = {*dict(_without_pooler(model).named_parameters())}
    new = lost & parameters if head.kind == "embedding" else lost
    if stray := [name for name in new if not set(name.split(".")) & {*head_modules(model)}]:
        raise UserError(
            f"model: the weights of {name!r} lack {len(stray)} that are no part of a head, such as {sorted(stray)[0]}; "
            "give a model that is whole."
        )
    if not head.is_as(Head.of(stored)):
        new |= {*output_parameters(model, head)}
    initialize(model, new, seed)
    return model


def _without_pooler(model: Any) -> Any:
    """The model without what makes one vector of a text's tokens in its own way, which most checkpoints lack."""
    if form_of(model.config) == VECTORS and getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def stored_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """How the stored weights are quantized, as their config says; empty where they are not."""
    stored: Any = getattr(config, "quantization_config", None) or {}
    return stored if isinstance(stored, dict) else stored.to_dict()


def is_placed(model: Any) -> bool:
    """Whether a model lies where it is to stay: quantized ones are loaded there, and some cannot be moved."""
    return getattr(model, "hf_quantizer", None) is not None


def is_quantized_model(config: PretrainedConfig, quantization: str | None) -> bool:
    """Whether a model's weights are quantized: in its files, or while they are loaded.

    Args:
        config: the model's config.
        quantization: how they are quantized while they are loaded, as a recipe has it; None where they are not.
    """
    return quantization is not None or getattr(config, "quantization_config", None) is not None


def _quantization_config(
    name: str, config: PretrainedConfig, dtype: torch.dtype, quantization: str | None
) -> Any | None:
    stored = stored_quantization(config)
    if stored and quantization:
        raise UserError(
            f"quantization: found {quantization}, but {name!r} is quantized already "
            f"({stored.get('quant_method')}); leave it out."
        )
    if quantization is not None:
        _check_bitsandbytes(quantization)
        if quantization == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if stored.get("quant_method") == "gptq":
        if not (find_spec("gptqmodel") and find_spec("optimum")):
            raise UserError(
                f"model: {name!r} is quantized by GPTQ, which needs gptqmodel and optimum; install them with: pip "
                "install 'diablo-peft[gptq]'."
            )
        # Left to itself, gptqmodel may take a kernel without a backward, which is no error there.
        trainable = "auto_trainable" if choose_device().type == "cuda" else "gptq_torch"
        return GPTQConfig(bits=stored["bits"], backend=trainable)
    return None


def _check_bitsandbytes(quantization: str) -> None:
    if not find_spec("bitsandbytes"):
        raise UserError(
            f"quantization: {quantization} needs bitsandbytes; install it with: pip install 'diablo-peft[quantized]'."
        )
    # Older ones load on a CPU, and fail in the first backward.
    found = version("bitsandbytes")
    if choose_device().type == "cpu" and Version(found) < Version("0.50"):
        raise UserError(
            f"quantization: {quantization} on a CPU needs bitsandbytes 0.50 or newer, and {found} is installed; "
            "install a newer one with: pip install -U 'diablo-peft[quantized]'."
        )


def meta_model(config: PretrainedConfig) -> Any:
    """The model without weights, on the meta device: shapes and names, at no cost.

    Raises:
        UserError: the config is not that of a causal language model, and names no other head.
    """
    try:
        with torch.device("meta"):
            return _without_pooler(auto_class(config).from_config(config))
    except ValueError:
        raise UserError(
            f"model: type {config.model_type!r} is not a causal language model; give one that is."
        ) from None


def learned_positions(model: Any) -> int | None:
    """The most tokens that a model with a learned vector for each position reads; None for a model of another kind.

    Args:
        model: a causal language model, on any device.
    """
    words = input_embedding(model)
    if words is None:
        return None
    # They stand beside the vectors of words; a part that sees images has positions of its own elsewhere.
    for name, module in model.get_submodule(words.rpartition(".")[0]).named_children():
        if isinstance(module, torch.nn.Embedding) and (name == "wpe" or "position" in name):
            # OPT has two vectors more than positions.
            return min(model.config.get_text_config().max_position_embeddings, module.num_embeddings)
    return None


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters, tied ones counted once."""
    # One that DeepSpeed has in parts looks empty.
    sizes = [
        (parameter.requires_grad, getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()
    ]
    return sum(size for is_trained, size in sizes if is_trained), sum(size for _, size in sizes)


def _cannot_load(name: str, what: str, error: Exception) -> str:
    # Of models that it does not know, transformers lists all that it does.
    reason = textwrap.shorten(first_line(error), 300, placeholder="...")
    if Path(name).exists():
        return f"model: the {what} in the folder {name!r} cannot be loaded ({reason})."
    return (
        f"model: {name!r} is no folder, and no {what} of that name could be had from the hub ({reason}). "
        f"{WHAT_TO_GIVE}{similar_folder(name)}"
    )
