"""Replacing an adapter's values in place, so that a compiled or merged model goes on without being made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.layers.tensor_parallel import check_whole


@torch.no_grad()
def hotswap_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Overwrite an adapter's values with those of a saved adapter of the same layout.

    Nothing is allocated but one tensor of the file at a time; parameters stay the objects they are, so a compiled model
    is not compiled again and an optimizer keeps its references. Where the adapter is merged, the diagonal of each
    weight is rewritten from its pristine values. Everything is checked before the first value is written.

    Args:
        model: a ``PeftModel`` with DiaBlo adapters, or one that ``torch.compile`` has wrapped.
        folder: folder of the saved adapter, which has ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: the adapter to overwrite.

    Raises:
        FileNotFoundError: the folder has no safetensors file; other formats run code and are not read.
        TypeError: the model is no ``PeftModel``, or the saved adapter is of another method.
        ValueError: the model has no such adapter, tensors are missing, left over or of another shape, or layers
            are cut over processes.
    """
    peft_model = getattr(model, "_orig_mod", model)
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"hotswap_adapter takes a PeftModel, got a {type(peft_model).__name__}.")
    if adapter_name not in peft_model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {', '.join(peft_model.peft_config)}.")
    check_whole(peft_model, "Swapping an adapter's values")
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter as safetensors.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, DiabloConfig):
        raise TypeError(f"{str(folder)!r} holds a {config.peft_type} adapter; only DiaBlo's can take its place.")
    targets = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    with safe_open(path, framework="pt") as saved:
        shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
        faults = [f"{key} is missing" for key in targets.keys() - shapes.keys()]
        faults += [f"{key} is left over" for key in shapes.keys() - targets.keys()]
        faults += [
            f"{key} is {shapes[key]} and takes the place of {tuple(target.shape)}"
            for key, target in targets.items()
            if key in shapes and shapes[key] != tuple(target.shape)
        ]
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError(
                f"{str(folder)!r} does not fit the adapter {adapter_name!r}: {'; '.join(sorted(faults)[:3])}{more}. "
                "Swap adapters of the same targets and num_blocks, or load it with load_adapter."
            )
        for key, target in targets.items():
            target.copy_(saved.get_tensor(key))
    for module in peft_model.modules():
        if isinstance(module, DiabloLayer) and adapter_name in module.merged_adapters:
            module.merge_instead(module.merged_adapters)
