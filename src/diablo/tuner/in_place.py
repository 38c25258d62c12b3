"""Where blocks can be written into the weight while training, and the same under ``torch.compile``."""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo.tuner.weights import is_quantized

_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def module_obstacle(module: nn.Module) -> str | None:
    """Why blocks have to stand beside the weight of a module; None where they can be written into it.

    They can where the module computes the plain product with a weight of its own that nothing else rewrites or shards.
    """
    if is_quantized(module):
        return "the weight is quantized"
    if not isinstance(module, (nn.Linear, Conv1D)):
        return f"a {type(module).__name__} is no linear layer"
    if type(module).forward not in _FORWARDS or "forward" in module.__dict__:
        return f"this {type(module).__name__} has a forward of its own"
    if has_hooks(module):
        return "hooks are registered on the layer"
    weight: Any = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return "the weight is sharded or computed from others"
    if weight.is_inference():
        return "the weight was made under torch.inference_mode"
    if not weight.is_meta and weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "the weight is a part of a larger tensor"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Holder(Protocol):
    def hold_in(self, weight: torch.Tensor, blocks: list[torch.Tensor]) -> None: ...


class HolderRegistry:
    """Layers by number, so that an operator can find the one that it serves: operators take tensors and numbers."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._layers: WeakValueDictionary[int, _Holder] = WeakValueDictionary()

    def add(self, layer: _Holder) -> int:
        """A number for a layer, which is not kept alive."""
        number = next(self._numbers)
        self._layers[number] = layer
        return number

    def __getitem__(self, number: int) -> _Holder:
        return self._layers[number]


REGISTRY = HolderRegistry()


@torch.library.custom_op("diablo::hold", mutates_args=("weight",))
def hold(weight: torch.Tensor, blocks: list[torch.Tensor], number: int) -> None:
    """Write blocks onto a weight's diagonal, as one operator that the compiler does not look into.

    Args:
        weight: the base layer's weight, or a copy that the compiler has made of it.
        blocks: those of the adapters that are active.
        number: the layer's number in ``REGISTRY``.
    """
    REGISTRY[number].hold_in(weight, blocks)


@hold.register_fake
def _(weight: torch.Tensor, blocks: list[torch.Tensor], number: int) -> None:
    """It returns nothing whose shape the compiler would have to know."""
