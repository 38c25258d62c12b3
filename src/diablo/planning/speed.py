"""What a recipe asks of its device for speed and memory, checked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PretrainedConfig

from diablo.devices import ACCELERATORS, title_of
from diablo.errors import UserError
from diablo.models.compiling import compiling_obstacle, layers_to_compile
from diablo.models.liger import liger_obstacle
from diablo.recipes.recipe import Recipe

# Where each of transformers' flash attentions runs, and the package that has it. The hub's kernels have all of them.
_FLASH = {
    "flash_attention_2": (("cuda", "xpu"), "flash_attn"),
    "flash_attention_3": (("cuda",), "flash_attn_interface"),
    "flash_attention_4": (("cuda",), "flash_attn.cute"),
}


def check_speed(recipe: Recipe, config: PretrainedConfig, model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a device can do what a recipe switches on.

    Args:
        recipe: the recipe.
        config: the model's config.
        model: the model on the meta device, with or without an adapter.
        device: where it is trained.
        dtype: what is computed in.

    Raises:
        UserError: it cannot, or two switches do not go together.
    """
    check_attention(recipe.attention, device, dtype)
    speed, checkpointing = recipe.speed, recipe.training.gradient_checkpointing
    if speed.liger and (reason := liger_obstacle(config.model_type, device)):
        raise UserError(f"speed.liger: found true; {reason}.")
    if speed.activation_offloading:
        check_offloading(device)
        if checkpointing == "selective":
            raise UserError(
                "speed.activation_offloading: found true with training.gradient_checkpointing: selective, whose "
                "results would stay on the device; set full or none."
            )
    if speed.compile:
        if checkpointing == "selective":
            raise UserError(
                "speed.compile: found true with training.gradient_checkpointing: selective; the compiler itself "
                "chooses what a layer computes again, so set none, or full."
            )
        if not layers_to_compile(model):
            raise UserError(
                f"speed.compile: found true, and models of type {config.model_type!r} have no layers of transformers' "
                "own class, which are what is compiled; leave it out."
            )
        if reason := compiling_obstacle(device):
            raise UserError(
                f"speed.compile: found true, and torch.compile makes no code for {title_of(device)} here ({reason}); "
                "install what it misses, such as a C++ compiler, or leave it out."
            )


def check_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Check that a device can train with an attention.

    Args:
        attention: the recipe's key.
        device: where the model is trained.
        dtype: what is computed in.

    Raises:
        UserError: it cannot, or the attention is not installed.
    """
    devices: tuple[str, ...]
    if attention == "flex_attention":
        devices, package = ("cuda", "xpu"), "torch"
    elif attention in _FLASH:
        devices, package = _FLASH[attention]
    elif "/" in attention:
        devices, package = ACCELERATORS, "kernels"
    else:
        return
    if device.type not in devices:
        wanted = " or ".join({"cuda": "CUDA or ROCm"}.get(each, each.upper()) for each in devices)
        raise UserError(
            f"attention: found {attention}, which trains on {wanted} alone, and this is {title_of(device)}; take "
            "eager or sdpa."
        )
    if attention == "flex_attention":
        return
    if dtype == torch.float32:
        raise UserError(f"attention: found {attention}, which computes in bf16 or fp16; set precision, or take sdpa.")
    if not find_spec("kernels") and not _is_installed(package):
        raise UserError(
            f"attention: found {attention}, which is not installed; install it with: pip install kernels, which "
            "fetches it from the hub, or take sdpa."
        )


def check_offloading(device: torch.device) -> None:
    """Check that a device has a memory of its own, out of which activations can be moved.

    Raises:
        UserError: it has none.
    """
    if device.type not in ("cuda", "xpu"):
        raise UserError(
            "speed.activation_offloading: found true, which moves activations out of a GPU's memory, and "
            f"{title_of(device)} computes in the machine's own; leave it out, or set training.gradient_checkpointing."
        )


def _is_installed(package: str) -> bool:
    # Looking for a part of a package imports the package.
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
