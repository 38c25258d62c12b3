"""The gradient of one run of blocks, by torch's products of matrices."""

from __future__ import annotations

import torch

from diablo.layout import Tile

FEW_TOKENS = 64
"""Up to here a product takes less time than the call that asks for it."""


def tile_product(x: torch.Tensor, grad_y: torch.Tensor, tile: Tile) -> torch.Tensor:
    """``(count, block_in, block_out)``: the product of each block's inputs, transposed, with its outputs' gradient."""
    if x.shape[0] <= FEW_TOKENS:
        return torch.bmm(tile.of_input_transposed(x), tile.of_output(grad_y))
    if tile.block_in > tile.block_out:
        # Matrix units do best with the narrower operand's columns as the product's rows.
        return tile_product(grad_y, x, tile.transposed).transpose(1, 2)
    # Blocks whose rows fill less than a vector of 64 bytes are multiplied two at a time, though half of the product is
    # thrown away: blocks of 9 x 9 in bf16 take four fifths of the time that they take one by one.
    pair = 2 if tile.block_out * x.element_size() < 64 and tile.count % 2 == 0 else 1
    paired = tile.grouped(pair)
    inputs = paired.of_input(x)
    if x.element_size() == 2 and x.device.type == "cpu":
        # torch's product of 16-bit matrices is up to 4 times slower through these strides.
        inputs = inputs.contiguous()
    product = torch.bmm(inputs.transpose(1, 2), paired.of_output(grad_y))
    split = product.view(paired.count, pair, tile.block_in, pair, tile.block_out)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(tile.count, tile.block_in, tile.block_out)


def as_rows(features: torch.Tensor) -> torch.Tensor:
    """``(..., features)`` -> ``(tokens, features)``; a batch may be empty."""
    if features.dim() == 2:
        return features
    return features.reshape(features.shape[:-1].numel(), features.shape[-1])
