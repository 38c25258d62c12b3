"""The convolution whose kernel is block-diagonal over the channels, at every position of the kernel.

It is made of torch's grouped convolution: one for the whole blocks, and one for the block that an edge cuts through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from diablo.layout import BlockLayout

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def block_diagonal_conv(
    x: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    base_output: torch.Tensor,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> torch.Tensor:
    """Convolve with a kernel that is block-diagonal over channels and add the result to ``base_output``.

    Args:
        x: ``(batch, in_channels, *size)`` or ``(in_channels, *size)``; ``size`` has one to three dimensions.
        blocks: ``(*kernel_size, N, d_in, d_out)``, of ``layout.blocks_shape``; cast to the dtype of ``x``.
        layout: the geometry, with the kernel's size as its stack.
        base_output: the output of the base layer, ``(batch, out_channels, *output_size)`` or without the batch, in the
            dtype of ``x``. It is overwritten and returned.
        stride: as ``nn.Conv2d`` takes it, one number for each dimension of size.
        padding: as ``nn.Conv2d`` takes it, filled with zeros; or ``"same"``, ``"valid"``.
        dilation: as ``nn.Conv2d`` takes it.

    Returns:
        ``base_output``.
    """
    dimensions = len(layout.stack)
    channels = -1 - dimensions
    convolve = _CONVOLUTIONS[dimensions]
    blocks = blocks.to(x.dtype)
    for tile in layout.tiles:
        kernel = tile.of_blocks(blocks).movedim((-3, -1, -2), (0, 1, 2)).flatten(0, 1)
        product = convolve(
            x.narrow(channels, tile.in_start, tile.in_size), kernel, None, stride, padding, dilation, tile.count
        )
        base_output.narrow(channels, tile.out_start, tile.out_size).add_(product)
    return base_output
