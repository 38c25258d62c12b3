"""Where blocks can stand in a weight during a pass, and how such a layer computes under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout
from diablo.ops.adapted_linear import product, product_back
from diablo.ops.linear import outer_product
from diablo.ops.tile_product import as_rows
from diablo.tuner.layers.offloading import hook_obstacle, offloading_hook
from diablo.tuner.plans import LAYERS
from diablo.tuner.weights import is_quantized, recomputed

_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def module_obstacle(module: nn.Module) -> str | None:
    """Why blocks have to stand beside the weight of a module; None where they can be written into it.

    They can be where the module computes the plain product, with a weight that is its own and that nothing else
    rewrites or shards.
    """
    if is_quantized(module):
        return "the weight is quantized"
    for name in ("weight", "bias"):
        if (how := recomputed(module, name)) is not None:
            return f"{how.by} computes the {name} anew in each forward"
    if not isinstance(module, (nn.Linear, Conv1D)):
        return f"a {type(module).__name__} is no linear layer"
    if reason := hook_obstacle(module):
        return reason
    if type(module).forward not in _FORWARDS or "forward" in module.__dict__:
        return f"this {type(module).__name__} has a forward of its own"
    if has_hooks(module):
        return "hooks are registered on the layer"
    return parameter_obstacle(module, "weight")


def parameter_obstacle(module: nn.Module, name: str) -> str | None:
    """Why blocks cannot be written into a parameter of a module; None where they can."""
    weight: Any = module._parameters.get(name)
    if offloading_hook(module) is not None:
        return hook_obstacle(module)
    if type(weight) is not nn.Parameter:
        return "the weight is sharded or computed from others"
    if weight.is_inference():
        return "the weight was made under torch.inference_mode"
    if not weight.is_meta and weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "the weight is a part of a larger tensor"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> list[Mapping[int, Any]]:
    """The hooks of each kind that are registered on a module."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


# A CUDA graph replays what an operator did when the graph was recorded. If a pass around the operator had written the
# blocks at that time, the replay would not write them.
_TAGS = tuple(tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None)


@torch.library.custom_op("diablo::linear", mutates_args=(), tags=_TAGS)
def compiled_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: list[torch.Tensor],
    number: torch.Tensor,
    adapter_names: str,
    num_blocks: list[int],
    in_features: int,
    out_features: int,
    lower: torch.dtype | None,
) -> torch.Tensor:
    """The product of a layer that has its blocks in its weight, as one operator that the compiler does not look into.

    The weight is not an argument. The operator finds it through the layer, writes the blocks into it and reads it. So a
    compiled graph does not keep the weight for its backward, where another forward would have changed it. And each call
    is by itself a function of its arguments.

    Args:
        x: ``(..., in_features)``, of the dtype of the product.
        bias: ``(out_features,)`` or None.
        blocks: the adapters' blocks, in the order of their names. They tell the graph what the result depends on.
        number: the layer's number in ``LAYERS``.
        adapter_names: names of the adapters, joined by dots. No name has a dot in it.
        num_blocks: N of each adapter.
        in_features: length of the input.
        out_features: length of the output.
        lower: the dtype that autocast asks for, or None.

    Returns:
        ``(..., out_features)`` in the dtype of ``x``.
    """
    with _weight(number, adapter_names) as weight:
        return product(x, weight, bias, lower)


@compiled_linear.register_fake
def _(x: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, out_features, _ = others
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.custom_op("diablo::linear_grad_x", mutates_args=(), tags=_TAGS)
def _grad_x(
    grad_y: torch.Tensor,
    blocks: list[torch.Tensor],
    number: torch.Tensor,
    adapter_names: str,
    in_features: int,
    lower: torch.dtype | None,
) -> torch.Tensor:
    with _weight(number, adapter_names) as weight:
        return product_back(grad_y, weight, lower)


@_grad_x.register_fake
def _(grad_y: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, in_features, _ = others
    return grad_y.new_empty(*grad_y.shape[:-1], in_features)


def _weight(number: torch.Tensor, adapter_names: str) -> AbstractContextManager[torch.Tensor]:
    layer: Any = LAYERS[int(number)]
    return layer.in_weight(tuple(adapter_names.split(".")) if adapter_names else ())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, _, blocks, number, ctx.adapter_names, ctx.num_blocks, ctx.in_features, ctx.out_features, ctx.lower = inputs
    ctx.save_for_backward(x, number, *blocks)


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
    x, number, *blocks = ctx.saved_tensors
    needs_x, needs_bias, needed, *_ = ctx.needs_input_grad
    grad_x = _grad_x(grad_y, blocks, number, ctx.adapter_names, ctx.in_features, ctx.lower) if needs_x else None
    grad_blocks = [
        outer_product(x, grad_y, BlockLayout(ctx.in_features, ctx.out_features, count), own.dtype) if wanted else None
        for count, own, wanted in zip(ctx.num_blocks, blocks, needed, strict=True)
    ]
    return grad_x, as_rows(grad_y).sum(0) if needs_bias else None, grad_blocks, *([None] * 6)


compiled_linear.register_autograd(_backward, setup_context=_setup)
