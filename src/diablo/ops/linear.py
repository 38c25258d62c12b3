"""The product with a block-diagonal matrix: an obvious reference, and a fast form with gradients of any order.

Both compute, for block i of ``blocks`` with shape ``(N, d_in, d_out)``,

    y[..., i*d_out : (i+1)*d_out] += x[..., i*d_in : (i+1)*d_in] @ blocks[i]

(arXiv 2506.03230, section 3). The geometry comes from :class:`diablo.layout.BlockLayout`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from diablo.layout import BlockLayout, Layout
from diablo.ops.backend import kernels_for
from diablo.ops.tile_product import as_rows, has_few_tokens, tile_product


def block_diagonal_linear_reference(
    x: torch.Tensor, blocks: torch.Tensor, layout: BlockLayout, base_output: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition of the product, written to be read: pad the input, multiply block by block, cut the output.

    Arguments, result and shapes are those of :func:`block_diagonal_linear`, but ``base_output`` is not overwritten.
    """
    count, block_in, block_out = blocks.shape
    padded = F.pad(x, (0, count * block_in - layout.in_features))
    split = padded.unflatten(-1, (count, block_in))
    product = torch.einsum("...ni,nio->...no", split, blocks.to(x.dtype))
    y = F.pad(product.flatten(-2), (0, layout.out_features - count * block_out))
    return y if base_output is None else base_output + y


def block_diagonal_linear(
    x: torch.Tensor, blocks: torch.Tensor, layout: Layout, base_output: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a block-diagonal matrix and add the product to ``base_output``.

    The product is accumulated **into** ``base_output``, which is overwritten and returned, so that no second tensor of
    the output's size exists. Where ``base_output`` is not contiguous, a copy of it takes its place. ``blocks`` is cast
    to the dtype of ``x`` for the product, ``x`` is never cast, and the gradient of ``blocks`` has the dtype of
    ``blocks``. Derivatives of any order work.

    Args:
        x: ``(..., in_features)``, any floating dtype; the leading dimensions may be empty.
        blocks: ``(N, d_in, d_out)``, of ``layout.blocks_shape``, any floating dtype.
        layout: the geometry.
        base_output: ``(..., out_features)``, of the dtype of ``x``; zeros where it is None.

    Returns:
        ``(..., out_features)`` in the dtype of ``x``.

    Raises:
        ValueError: a shape does not fit the layout.
        TypeError: ``base_output`` has another dtype than ``x``.
    """
    output_shape = (*x.shape[:-1], layout.out_features)
    if x.dim() == 0 or x.shape[-1] != layout.in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; the layout takes (..., {layout.in_features}).")
    if tuple(blocks.shape) != layout.blocks_shape:
        raise ValueError(f"blocks has shape {tuple(blocks.shape)}; the layout takes {layout.blocks_shape}.")
    if base_output is None:
        base_output = x.new_zeros(output_shape)
    elif tuple(base_output.shape) != output_shape:
        raise ValueError(f"base_output has shape {tuple(base_output.shape)}; x and the layout make it {output_shape}.")
    elif base_output.dtype != x.dtype:
        raise TypeError(f"base_output is {base_output.dtype} and x is {x.dtype}; cast one to the other first.")
    if torch.compiler.is_compiling() and isinstance(layout, BlockLayout):
        # The compiler fuses the addition by itself, and it cannot trace a function that writes to its arguments. Slices
        # of a matrix (LayoutPart) do not come here while it compiles: their layers run outside of compiled graphs.
        return block_diagonal_linear_reference(x, blocks, layout, base_output)
    return _Accumulate.apply(base_output.contiguous(), x, blocks, layout)


def outer_product(x: torch.Tensor, grad_y: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The diagonal blocks of ``x^T grad_y``: the gradient of the blocks. Derivatives of any order work.

    Args:
        x: ``(..., in_features)``.
        grad_y: ``(..., out_features)``, of the dtype of ``x``.
        layout: the geometry.
        dtype: dtype of the result.

    Returns:
        ``layout.blocks_shape``, zero where a block lies outside the matrix.
    """
    if torch.is_grad_enabled():
        return _OuterProduct.apply(x, grad_y, layout, dtype)
    # No graph is needed in a first-order backward, and building one would cost as much as a small product.
    return _outer_product(x, grad_y, layout, dtype)


class _Accumulate(torch.autograd.Function):
    """``y += x * blockdiag(blocks)`` in place.

    The backward is made of the same product, with the blocks transposed, and of :class:`_OuterProduct`. The backward of
    :class:`_OuterProduct` is made of this product again, so that derivatives of every order exist.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, blocks: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, blocks)
        ctx.layout = layout
        accumulate(y, x, blocks, layout)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        x, blocks = ctx.saved_tensors
        grad_x = grad_blocks = None
        if ctx.needs_input_grad[1]:
            grad_x = _product(grad_y, blocks.transpose(1, 2), ctx.layout.transposed)
        if ctx.needs_input_grad[2]:
            grad_blocks = outer_product(x, grad_y, ctx.layout, blocks.dtype)
        return grad_y, grad_x, grad_blocks, None


class _OuterProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grad_y: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x, grad_y)
        ctx.layout = layout
        return _outer_product(x, grad_y, layout, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (cotangent,) = grads
        x, grad_y = ctx.saved_tensors
        grad_x = _product(grad_y, cotangent.transpose(1, 2), ctx.layout.transposed)
        return grad_x, _product(x, cotangent, ctx.layout), None, None


def _product(x: torch.Tensor, blocks: torch.Tensor, layout: Layout) -> torch.Tensor:
    """``x * blockdiag(blocks)``, ``(..., out_features)``; further derivatives work where gradients are enabled."""
    shape = (*x.shape[:-1], layout.out_features)
    if torch.is_grad_enabled():
        return _Accumulate.apply(x.new_zeros(shape), x, blocks, layout)
    # Columns that the product overwrites need not be filled with zeros first.
    is_covered = sum(tile.out_size for tile in layout.tiles) == layout.out_features
    y = x.new_empty(shape) if is_covered else x.new_zeros(shape)
    accumulate(y, x, blocks, layout, overwrite=True)
    return y


def accumulate(y: torch.Tensor, x: torch.Tensor, blocks: torch.Tensor, layout: Layout, overwrite: bool = False) -> None:
    """Write ``y += x * blockdiag(blocks)`` into ``y``, tile by tile, through strided views.

    Args:
        y: ``(..., out_features)``, contiguous or of two dimensions.
        x: ``(..., in_features)``, of the dtype of ``y``.
        blocks: of ``layout.blocks_shape``; cast to the dtype of ``x``.
        layout: the geometry.
        overwrite: replace the values in the columns of the blocks instead of adding to them. They are not read.
    """
    rows, target = as_rows(x), y if y.dim() == 2 else y.view(math.prod(y.shape[:-1]), y.shape[-1])
    if blocks.dtype is not x.dtype:
        blocks = blocks.to(x.dtype)
    for tile in layout.tiles:
        own = blocks if layout.is_even else tile.of_blocks(blocks)
        tile.of_output(target).baddbmm_(tile.of_input(rows), own, beta=0 if overwrite else 1)


def _outer_product(x: torch.Tensor, grad_y: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    x, grad_y = as_rows(x), as_rows(grad_y)
    is_small = x.is_cpu and has_few_tokens(x)
    if not is_small and (kernels := kernels_for(x.device)) is not None:
        return kernels.outer_product(x, grad_y, layout, dtype)
    if layout.is_even:
        product = tile_product(x, grad_y, layout.tiles[0])
        if product.dtype is dtype and product.is_contiguous():
            return product
        # Some optimizers read a gradient's memory as one row of numbers: it has to be contiguous, as the parameter is.
        return product.new_empty(layout.blocks_shape, dtype=dtype).copy_(product)
    # Entries outside the matrix are in no tile: they stay zero.
    grad_blocks = x.new_zeros(layout.blocks_shape, dtype=dtype)
    for tile in layout.tiles:
        tile.of_blocks(grad_blocks).copy_(tile_product(x, grad_y, tile))
    return grad_blocks
