"""Models that accelerate keeps partly on the CPU or on disk.

The blocks stay on the device that computes. A weight that is kept elsewhere is fetched before it is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from torch import nn


def offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate by which a module has its tensors during its forward alone; None where it keeps them."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((own for own in hooks if isinstance(own, AlignDevicesHook) and own.offload), None)


def hook_obstacle(module: nn.Module) -> str | None:
    """Why blocks cannot be written into the weight of a module that accelerate looks after; None where it does not."""
    if offloading_hook(module) is not None:
        return "accelerate keeps the weight on the CPU or on disk between forwards"
    return "accelerate puts the layer's inputs on its device" if hasattr(module, "_hf_hook") else None


@torch.no_grad()
def take_back(blocks: nn.Module) -> None:
    """Put blocks that accelerate has offloaded on the device where they are needed, for good.

    Accelerate fetches the tensors of a module when that is called, and nobody calls a container of parameters. Blocks
    are small, and are trained: they have to be the same tensors in every step. They stay the parameters that they are.

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
        # Nothing is fetched when the hook is taken off, which would be looked for under its usual name.
        hook.offload = False
        remove_hook_from_module(container)


def _kept_value(hook: AlignDevicesHook, name: str) -> torch.Tensor:
    kept: Any = hook.weights_map
    if name in kept:
        return kept[name]
    # PEFT puts an adapter's name before the last part of a tensor's name, as LoRA has it, when it writes to disk.
    prefix: str = getattr(kept, "prefix", "")
    other = f"{prefix.removesuffix('diablo_blocks.')}{name}.diablo_blocks"
    if other in getattr(kept, "dataset", ()):
        return kept.dataset[other]
    raise RuntimeError(
        f"The blocks {prefix}{name} were offloaded, and are not among the tensors that accelerate keeps: load the "
        "adapter again, with PeftModel.from_pretrained on the offloaded base model."
    )
