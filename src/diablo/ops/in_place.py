"""The product with a weight on whose diagonal the blocks stand already: one product, as without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diablo.layout import Layout
from diablo.ops.linear import as_rows, outer_product


def linear_in_place(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    hold: Callable[[bool], None],
) -> torch.Tensor:
    """``F.linear(x, weight, bias)``, with gradients for ``x``, ``bias`` and the blocks on the weight's diagonal.

    The gradient of the blocks is that part of ``grad_y^T x``: 1/N of a product. Only ``x`` is kept for backward, as it
    is; the weight is read again then. Derivatives of any order work.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``, of any strides, frozen.
        bias: ``(out_features,)`` or None.
        blocks: the parameters whose sum stands on the diagonal, each of its layout's ``blocks_shape``.
        layouts: the geometry of each.
        hold: called before the weight is read. With True, in the forward, it writes the blocks as they are now; with
            False, in the backward, it writes them only where something else has been written in between.

    Returns:
        ``(..., out_features)``.
    """
    lower = lowered(x)
    if lower is None:
        return _Linear.apply(x, weight, bias, tuple(layouts), hold, None, *blocks)
    bias = None if bias is None else bias.to(lower)
    with torch.autocast(x.device.type, enabled=False):
        return _Linear.apply(x.to(lower), weight, bias, tuple(layouts), hold, lower, *blocks)


def lowered(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would lower a product of ``x`` to; None where it leaves it alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lower: torch.dtype | None
) -> torch.Tensor:
    """``x W^T + bias``, with the weight lowered as autocast would; ``x`` and ``bias`` are so already."""
    return F.linear(x, weight if lower is None else weight.to(lower), bias)


class _Linear(torch.autograd.Function):
    """``y = x W^T + bias``, bilinear in ``x`` and the blocks: its backward is made of the same product, transposed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layouts: tuple[Layout, ...],
        hold: Callable[[bool], None],
        lower: torch.dtype | None,
        *blocks: torch.Tensor,
    ) -> torch.Tensor:
        hold(True)
        # The blocks are kept so that autograd notices where they are overwritten before backward. The weight is not,
        # since it is overwritten in every forward; `hold` sees to it that it is right when it is read.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[6:]) else None, *blocks)
        ctx.weight, ctx.layouts, ctx.hold, ctx.lower = weight, layouts, hold, lower
        return product(x, weight, bias, lower)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        x, *blocks = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():
            transposed = tuple(layout.transposed for layout in ctx.layouts)
            grad_x = _Linear.apply(
                grad_y,
                ctx.weight.T,
                None,
                transposed,
                lambda _: ctx.hold(False),
                ctx.lower,
                *(own.transpose(1, 2) for own in blocks),
            )
        elif ctx.needs_input_grad[0]:
            ctx.hold(False)
            grad_x = product(grad_y, ctx.weight.T, None, ctx.lower)
        if ctx.needs_input_grad[2]:
            grad_bias = as_rows(grad_y).sum(0)
        needed = ctx.needs_input_grad[6:]
        grads_of_blocks = [
            outer_product(x, grad_y, layout, own.dtype) if wanted else None
            for own, layout, wanted in zip(blocks, ctx.layouts, needed, strict=True)
        ]
        return grad_x, None, grad_bias, None, None, None, *grads_of_blocks
