"""The product with a weight on whose diagonal the blocks stand already: one product, as without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diablo.layout import BlockLayout
from diablo.ops.linear import as_rows, outer_product


def linear_in_place(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    blocks: Sequence[torch.Tensor],
    layouts: Sequence[BlockLayout],
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
    device = x.device.type
    can_autocast = torch.amp.is_autocast_available(device)
    if can_autocast and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        lower = torch.get_autocast_dtype(device)
        bias = None if bias is None else bias.to(lower)
        with torch.autocast(device, enabled=False):
            return _Linear.apply(x.to(lower), weight, bias, tuple(layouts), hold, lower, *blocks)
    return _Linear.apply(x, weight, bias, tuple(layouts), hold, None, *blocks)


def attach_blocks(
    y: torch.Tensor, x: torch.Tensor, blocks: Sequence[torch.Tensor], layouts: Sequence[BlockLayout]
) -> torch.Tensor:
    """``y`` as it is, through which the blocks on the diagonal of the weight that made it get their gradients.

    For graphs that ``torch.compile`` traces, where the product itself is left to the compiler.

    Args:
        y: ``(..., out_features)``, the product of ``x`` with the weight.
        x: ``(..., in_features)``.
        blocks: as in :func:`linear_in_place`.
        layouts: the geometry of each.
    """
    return _Attach.apply(y, x, tuple(layouts), *blocks)


class _Linear(torch.autograd.Function):
    """``y = x W^T + bias``, bilinear in ``x`` and the blocks: its backward is made of the same product, transposed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layouts: tuple[BlockLayout, ...],
        hold: Callable[[bool], None],
        lower: torch.dtype | None,
        *blocks: torch.Tensor,
    ) -> torch.Tensor:
        hold(True)
        # The blocks are kept so that autograd notices where they are overwritten before backward. The weight is not,
        # since it is overwritten in every forward; `hold` sees to it that it is right when it is read.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[6:]) else None, *blocks)
        ctx.weight, ctx.layouts, ctx.hold, ctx.lower = weight, layouts, hold, lower
        return F.linear(x, weight if lower is None else weight.to(lower), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        x, *blocks = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
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
        if ctx.needs_input_grad[2]:
            grad_bias = as_rows(grad_y).sum(0)
        needed = ctx.needs_input_grad[6:]
        return grad_x, None, grad_bias, None, None, None, *_grad_blocks(x, grad_y, blocks, ctx.layouts, needed)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, layouts: tuple[BlockLayout, ...], *blocks: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, *blocks)
        ctx.layouts = layouts
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        x, *blocks = ctx.saved_tensors
        return grad_y, None, None, *_grad_blocks(x, grad_y, blocks, ctx.layouts, ctx.needs_input_grad[3:])


def _grad_blocks(
    x: torch.Tensor,
    grad_y: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    layouts: Sequence[BlockLayout],
    needed: Sequence[bool],
) -> list[torch.Tensor | None]:
    return [
        outer_product(x, grad_y, layout, own.dtype) if wanted else None
        for own, layout, wanted in zip(blocks, layouts, needed, strict=True)
    ]
