"""The gradient of the blocks of one tile, by torch's products of matrices."""

from __future__ import annotations

import math

import torch

from diablo.layout import Tile
from diablo.ops.backend import is_tracing

FEW_TOKENS = 64
"""Up to this number of tokens, a product takes less time than the call to torch that starts it."""


def tile_product(x: torch.Tensor, grad_y: torch.Tensor, tile: Tile) -> torch.Tensor:
    """For each block of a tile, the product of its inputs, transposed, with the gradient of its outputs.

    Args:
        x: ``(tokens, in_features)``.
        grad_y: ``(tokens, out_features)``, of the dtype of ``x``.
        tile: the blocks.

    Returns:
        ``(count, block_in, block_out)`` in the dtype of ``x``.
    """
    if has_few_tokens(x):
        return torch.bmm(tile.of_input_transposed(x), tile.of_output(grad_y))
    if tile.block_in > tile.block_out:
        # Matrix units are fastest where the columns of the narrower operand become the rows of the product.
        return tile_product(grad_y, x, tile.transposed).transpose(1, 2)
    # A vector of the processor has 64 bytes. Blocks with shorter rows are multiplied two at a time, though half of the
    # product is thrown away: blocks of 9 x 9 in bf16 then take four fifths of the time that they take one by one.
    pair = 2 if tile.block_out * x.element_size() < 64 and tile.count % 2 == 0 else 1
    paired = tile.grouped(pair)
    inputs = paired.of_input(x)
    if x.element_size() == 2 and x.device.type == "cpu":
        # torch's product of 16-bit matrices is up to 4 times slower through these strides.
        inputs = inputs.contiguous()
    product = torch.bmm(inputs.transpose(1, 2), paired.of_output(grad_y))
    split = product.view(paired.count, pair, tile.block_in, pair, tile.block_out)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(tile.count, tile.block_in, tile.block_out)


def has_few_tokens(rows: torch.Tensor) -> bool:
    """Whether ``(tokens, features)`` has so few tokens that products of it are started in the simplest way.

    It is False while torch.compile traces: a graph is to serve every number of tokens.
    """
    return not is_tracing() and rows.shape[0] <= FEW_TOKENS


def as_rows(features: torch.Tensor) -> torch.Tensor:
    """``(..., features)`` -> ``(tokens, features)``; the number of tokens may be 0."""
    if features.dim() == 2:
        return features
    # `Size.numel` would make the compiler take the number of tokens for a constant.
    return features.reshape(math.prod(features.shape[:-1]), features.shape[-1])
