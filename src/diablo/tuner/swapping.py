"""Replacing an adapter's values in place. A compiled or merged model can be used on as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from diablo.layout import Layout
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers import DiabloLayer, DiabloParameters
from diablo.tuner.layers.tensor_parallel import check_whole
from diablo.tuner.targets import resolve_targets
from diablo.tuner.tokens import unmerged_tokens


def hotswap_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Overwrite an adapter's values with those of a saved adapter of the same targets.

    Nothing is allocated but one tensor of the file at a time. The parameters stay the same objects: a compiled model is
    not compiled again, and an optimizer keeps its references. If the adapter is merged, the diagonal of each weight is
    rewritten from its base values. Everything is checked before the first value is written.

    If nothing is compiled, the saved adapter may have another ``num_blocks`` or ``block_pattern``. The parameters then
    get other shapes and lose their gradients, and their optimizer has to be made anew. The adapter's settings follow,
    so that it is saved as what it now is. Its dropout and ``in_place`` stay.

    ``peft.utils.hotswap.hotswap_adapter`` does the same for DiaBlo's adapters.

    Args:
        model: a ``PeftModel`` with DiaBlo adapters, or one that ``torch.compile`` has wrapped.
        folder: folder of the saved adapter, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: the adapter to overwrite.

    Raises:
        FileNotFoundError: the folder has no safetensors file. Other formats run code and are not read.
        TypeError: the model is no ``PeftModel``, or one of the two adapters is of another method.
        ValueError: the model has no such adapter; tensors are missing, left over or of another shape; the model is
            compiled and the blocks have other sizes; or layers are cut over processes.
    """
    _check_model(model, adapter_name)
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter as safetensors.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, DiabloConfig):
        raise TypeError(f"{str(folder)!r} holds a {config.peft_type} adapter; only DiaBlo's can take its place.")
    with safe_open(path, framework="pt") as saved:
        shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
        _swap(model, config, adapter_name, shapes, saved.get_tensor)


def swap_state_dict(
    model: Any, state_dict: Mapping[str, torch.Tensor], adapter_name: str, config: DiabloConfig
) -> None:
    """Do what :func:`hotswap_adapter` does, from tensors in place of a folder. PEFT's own function calls this.

    Args:
        model: as there.
        state_dict: the tensors of the saved adapter, by names that have ``adapter_name`` after ``diablo_blocks``.
        adapter_name: the adapter to overwrite.
        config: the settings of the saved adapter.

    Raises:
        TypeError: the model is no ``PeftModel``, or its adapter is of another method.
        ValueError: as there.
    """
    _check_model(model, adapter_name)
    tensors = {}
    for key, value in state_dict.items():
        module, blocks, own = key.rpartition(".diablo_blocks.")
        _, dot, parameter = own.partition(".")
        tensors[f"{module}.diablo_blocks{dot}{parameter}" if blocks else key] = value
    _swap(model, config, adapter_name, {key: tuple(value.shape) for key, value in tensors.items()}, tensors.__getitem__)


def _check_model(model: Any, adapter_name: str) -> None:
    peft_model = _unwrapped(model)
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"hotswap_adapter takes a PeftModel, got a {type(peft_model).__name__}.")
    if adapter_name not in peft_model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {', '.join(peft_model.peft_config)}.")
    config = peft_model.peft_config[adapter_name]
    if not isinstance(config, DiabloConfig):
        raise TypeError(f"The adapter {adapter_name!r} is of {config.peft_type}; only DiaBlo's can be overwritten.")
    check_whole(peft_model, "Swapping an adapter's values")


@torch.no_grad()
def _swap(
    model: Any,
    config: DiabloConfig,
    adapter_name: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> None:
    """Overwrite an adapter of a checked model.

    Args:
        model: the model.
        config: the settings of the saved adapter.
        adapter_name: the adapter to overwrite.
        shapes: the shapes of the saved tensors, by their names in the file.
        read: gives the tensor of a name.
    """
    peft_model = _unwrapped(model)
    current: Any = peft_model.peft_config[adapter_name]
    if _ranges(config) != _ranges(current):
        raise ValueError(
            f"The saved adapter has layer_replication={config.layer_replication!r} and the model has "
            f"{current.layer_replication!r}: swap adapters of the same layer_replication."
        )
    if config.trainable_token_indices != current.trainable_token_indices:
        raise ValueError(
            f"The saved adapter has trainable_token_indices={config.trainable_token_indices} and the model has "
            f"{current.trainable_token_indices}: swap adapters of the same tokens."
        )
    rows = {} if config.trainable_token_indices is None else {"save_embedding_layers": False}
    targets = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, **rows)
    targets = {_plain(key): value for key, value in targets.items()}
    expected = {key: tuple(value.shape) for key, value in targets.items()}
    places = list(_places(peft_model, adapter_name))
    layouts: dict[DiabloLayer, dict[str, Layout]] = {}
    if (config.num_blocks, config.block_pattern) != (current.num_blocks, current.block_pattern):
        layouts = _other_layouts(peft_model, config, adapter_name)
        expected |= {key: layouts[layer][name].blocks_shape for key, layer, name in places if layer in layouts}
    _check_fit(adapter_name, shapes, expected)
    if layouts and _is_compiled(model):
        raise ValueError(
            f"The saved adapter has num_blocks={config.num_blocks} where {adapter_name!r} has {current.num_blocks}, "
            "and the model is compiled for blocks of these sizes: swap adapters of the same num_blocks and "
            "block_pattern, or swap before torch.compile."
        )
    for layer, own in layouts.items():
        layer.set_layouts(adapter_name, own)
    # Blocks of other sizes have other memory now.
    targets |= {key: layer.blocks_of(adapter_name)[name].data for key, layer, name in places}
    with unmerged_tokens(peft_model):
        for key, target in targets.items():
            target.copy_(read(key))
    for _, layer in _layers(peft_model):
        if adapter_name in layer.merged_adapters:
            layer.merge_instead(layer.merged_adapters)
    current.num_blocks, current.block_pattern = config.num_blocks, dict(config.block_pattern)
    tuner: Any = peft_model.base_model
    if layouts:
        tuner.digest_base(adapter_name)
    tuner.note_base(adapter_name, config)
    if layouts and current._trained_of_all is not None:
        trained = sum(targets[key].numel() for key, _, _ in places)
        current._trained_of_all = (trained, current._trained_of_all[1])


def _check_fit(
    adapter_name: str, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    faults = [f"{key} is missing" for key in expected.keys() - shapes.keys()]
    faults += [f"{key} is left over" for key in shapes.keys() - expected.keys()]
    faults += [
        f"{key} is {shapes[key]}, where {shape} is needed"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"The saved adapter does not fit the adapter {adapter_name!r}: {'; '.join(sorted(faults)[:3])}{more}. "
            "Swap adapters of the same targets, or load it with load_adapter."
        )


def _other_layouts(
    peft_model: PeftModel, config: DiabloConfig, adapter_name: str
) -> dict[DiabloLayer, dict[str, Layout]]:
    """The saved adapter's layouts, for the layers where its blocks have other shapes."""
    found = {
        (target.module, target.parameter or "weight"): target.layout
        for target in resolve_targets(peft_model.get_base_model(), copy.deepcopy(config))
    }
    layouts = {}
    for module, layer in _layers(peft_model):
        before = layer.layouts_of(adapter_name)
        after = {name: found.get((module, name), layout) for name, layout in before.items()}
        if any(after[name].blocks_shape != layout.blocks_shape for name, layout in before.items()):
            layouts[layer] = after
    return layouts


def _layers(peft_model: PeftModel) -> Iterator[tuple[str, DiabloLayer]]:
    """The adapted layers with their names in the base model."""
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, DiabloLayer):
            yield name, module


def _places(peft_model: PeftModel, adapter_name: str) -> Iterator[tuple[str, DiabloLayer, str]]:
    """For each tensor of blocks: its name in a file, its layer, and the name of the weight that it belongs to."""
    for module, layer in _layers(peft_model):
        for name in layer.blocks_of(adapter_name):
            parameter = f".{name}" if isinstance(layer, DiabloParameters) else ""
            yield _plain(f"base_model.model.{module}.diablo_blocks{parameter}"), layer, name


def _plain(name: str) -> str:
    """A name as it is in a model without compiled modules."""
    return name.replace("_orig_mod.", "")


def _unwrapped(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)


def _is_compiled(model: Any) -> bool:
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())


def _ranges(config: DiabloConfig) -> list[tuple[int, ...]]:
    # A file has lists for tuples.
    return [tuple(own) for own in config.layer_replication or ()]
