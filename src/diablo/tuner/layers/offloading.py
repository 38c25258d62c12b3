"""Models that accelerate keeps partly on the CPU or on disk.

The blocks stay on the device that computes. A weight that is kept elsewhere is fetched before it is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from torch import nn


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook by which accelerate lends a module its tensors for its forward; None if it has them always."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((own for own in hooks if isinstance(own, AlignDevicesHook) and own.offload), None)


def hook_obstacle(module: nn.Module) -> str | None:
    """Why accelerate keeps blocks from being written into the weight of a module; None if it does not."""
    if offloading_hook(module) is not None:
        return "accelerate keeps the weight on the CPU or on disk between forwards"
    return "accelerate puts the layer's inputs on its device" if hasattr(module, "_hf_hook") else None


@torch.no_grad()
def take_back(blocks: nn.Module) -> None:
    """Put blocks that accelerate has offloaded back on the device where they are needed, for good.

    accelerate fetches the tensors of a module when the module is called, and nobody calls a container of parameters.
    Blocks are small, and they are trained, so they must be the same tensors in every step. They stay the same
    parameters.

    Args:
        blocks: the containers of a layer's blocks.

    Raises:
        RuntimeError: their values are not where accelerate keeps them.
    """
    for container in blocks.modules():
        hook = offloading_hook(container)
        if hook is None:
            continue
        for name, parameter in container._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = _kept_value(hook, name).to(hook.execution_device, parameter.dtype)
                torch.utils.swap_tensors(parameter, nn.Parameter(value, parameter.requires_grad))
        # Taking the hook off would fetch the tensors under their usual names. This keeps it from fetching anything.
        hook.offload = False
        remove_hook_from_module(container)


def _kept_value(hook: AlignDevicesHook, name: str) -> torch.Tensor:
    kept: Any = hook.weights_map
    if name in kept:
        return kept[name]
    # When PEFT writes to disk, it puts an adapter's name before the last part of a tensor's name, as for LoRA.
    prefix: str = getattr(kept, "prefix", "")
    other = f"{prefix.removesuffix('diablo_blocks.')}{name}.diablo_blocks"
    if other in getattr(kept, "dataset", ()):
        return kept.dataset[other]
    raise RuntimeError(
        f"The blocks {prefix}{name} were offloaded, and are not among the tensors that accelerate keeps: load the "
        "adapter again, with PeftModel.from_pretrained on the offloaded base model."
    )
