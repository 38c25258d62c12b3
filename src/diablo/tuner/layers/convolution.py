"""Convolutions: blocks over the channels, at each position of the kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from diablo.ops import block_diagonal_conv
from diablo.tuner.layers.module import ModuleLayer


class DiabloConv(ModuleLayer):
    """An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with blocks over its channels at each position of its kernel.

    The forward takes ``(batch, in_channels, *size)`` or ``(in_channels, *size)``. The blocks stand beside the weight.
    """

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        base_layer: Any = self.get_base_layer()
        x = self.diablo_dropout[adapter_name](x)
        padding = base_layer.padding
        if base_layer.padding_mode != "zeros":
            x = F.pad(x, base_layer._reversed_padding_repeated_twice, mode=base_layer.padding_mode)
            padding = (0,) * len(base_layer.kernel_size)
        return block_diagonal_conv(
            x,
            self.diablo_blocks[adapter_name],
            self.diablo_layout[adapter_name],
            result,
            stride=base_layer.stride,
            padding=padding,
            dilation=base_layer.dilation,
        )
