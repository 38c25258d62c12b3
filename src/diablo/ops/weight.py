"""Weights with blocks added to their diagonals: copies, writing in place, and gradients through such weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from diablo.layout import Layout


def add_to_diagonal(weight: torch.Tensor, blocks: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A copy of ``weight`` with ``blocks`` added to its diagonal, equal to the bit to the merged weight.

    Args:
        weight: ``(*stack, out_features, in_features)``, of any strides. The copy has the same order in memory.
        blocks: ``(*stack, N, d_in, d_out)``, of ``layout.blocks_shape``, any floating dtype.
        layout: the geometry.

    Returns:
        A tensor of the shape and dtype of ``weight``. Derivatives of any order work.
    """
    return _AddToDiagonal.apply(weight, blocks, layout)


@torch.no_grad()
def write_to_diagonal(weight: torch.Tensor, blocks: torch.Tensor, layout: Layout) -> None:
    """Add ``blocks`` to the diagonal of ``weight`` in place, rounding once.

    The sum is formed in fp32, or in the weight's dtype where that is wider.

    Args:
        weight: ``(*stack, out_features, in_features)``, of any strides.
        blocks: of ``layout.blocks_shape``, any floating dtype, on any device.
        layout: the geometry.
    """
    # In fp32, an fp64 weight would lose half of its digits.
    wide = torch.promote_types(weight.dtype, torch.float32)
    for tile in layout.tiles:
        view = tile.of_weight(weight)
        view.copy_(view.to(wide) + tile.of_blocks(blocks).to(view.device, wide))


@torch.no_grad()
def summed(blocks: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of several adapters' blocks, in fp32, or in the widest of their dtypes where that is wider.

    Args:
        blocks: one tensor or more, all of one shape. A single one is returned as it is, in its own dtype.
        out: the result of an earlier call for the same blocks, to write the sum to; a new tensor where None.
    """
    if len(blocks) == 1:
        return blocks[0]
    if out is None:
        dtypes = (own.dtype for own in blocks)
        out = torch.empty_like(blocks[0], dtype=reduce(torch.promote_types, dtypes, torch.float32))
    out.copy_(blocks[0])
    for other in blocks[1:]:
        out.add_(other)
    return out


@torch.no_grad()
def set_diagonal(weight: torch.Tensor, base: Sequence[torch.Tensor], blocks: torch.Tensor, layout: Layout) -> None:
    """Make the diagonal of ``weight`` the sum of ``base`` and ``blocks``, in one step and without a temporary tensor.

    The sum is formed in fp32, or in the wider of the two dtypes where that is wider, and rounded once.

    Args:
        weight: ``(*stack, out_features, in_features)``, of any strides.
        base: for each of ``layout.tiles`` the base values, of the shape of ``tile.of_weight(weight)`` and of the dtype
            of ``weight``.
        blocks: of ``layout.blocks_shape``.
        layout: the geometry.
    """
    for tile, values in zip(layout.tiles, base, strict=True):
        torch.add(values, tile.of_blocks(blocks).to(values.device), out=tile.of_weight(weight))


def trained_diagonal(weight: torch.Tensor, blocks: Sequence[torch.Tensor], layouts: Sequence[Layout]) -> torch.Tensor:
    """A weight that has the sum of ``blocks`` in it, as a tensor that gives the blocks their gradients.

    Nothing is copied: the result shares the memory of ``weight``. Autograd does not notice where that memory is written
    to later. Whoever writes to it must put the values back before a backward reads them.

    Args:
        weight: ``(*stack, out_features, in_features)``, of any strides, frozen. The blocks stand on its diagonal.
        blocks: the adapters' parameters, each of its layout's ``blocks_shape``.
        layouts: the layout of each of the blocks.

    Returns:
        A tensor of the shape and dtype of ``weight``. Derivatives of any order work.
    """
    return _TrainedDiagonal.apply(weight, tuple(layouts), *blocks)


class _TrainedDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, layouts: tuple[Layout, ...], *blocks: torch.Tensor) -> torch.Tensor:
        # The blocks are saved so that autograd notices where they are overwritten before the backward.
        ctx.save_for_backward(*blocks)
        ctx.layouts = layouts
        return weight.data

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        blocks = ctx.saved_tensors
        taken = [
            _TakeDiagonal.apply(grad, layout, own.dtype) if wanted else None
            for own, layout, wanted in zip(blocks, ctx.layouts, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None, *taken


class _AddToDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, blocks: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout, ctx.dtype = layout, blocks.dtype
        total = weight.clone()
        write_to_diagonal(total, blocks, layout)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        grad_blocks = _TakeDiagonal.apply(grad, ctx.layout, ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad if ctx.needs_input_grad[0] else None, grad_blocks, None


class _TakeDiagonal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        ctx.layout, ctx.dtype = layout, weight.dtype
        ctx.shape = weight.shape
        # Entries outside the matrix are in no tile: they stay zero.
        blocks = weight.new_zeros(layout.blocks_shape, dtype=dtype)
        for tile in layout.tiles:
            tile.of_blocks(blocks).copy_(tile.of_weight(weight))
        return blocks

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        zeros = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
        return _AddToDiagonal.apply(zeros, grad, ctx.layout), None, None
