"""Triton kernels for what a training step does with blocks beside the products of the model itself.

One writes the blocks of all layers onto the diagonals of their weights in one launch. The other is the gradient of the
blocks. Everything else is left to torch. Import the package through :func:`diablo.ops.backend.kernels_for`.
"""

from __future__ import annotations

import torch

from diablo.layout import BlockLayout
from diablo.ops.kernels.gradient import outer_product
from diablo.ops.kernels.shared import INTERPRETED
from diablo.ops.kernels.table import DiagonalTable

__all__ = ["INTERPRETED", "DiagonalTable", "outer_product", "try_out"]


def try_out(device: torch.device) -> None:
    """Compile a small kernel for ``device`` and launch it; whatever Triton raises where it cannot is raised."""
    tokens = torch.zeros(16, 16, device=device)
    outer_product(tokens, tokens, BlockLayout(16, 16, 1), torch.float32)
