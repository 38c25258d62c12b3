"""Triton kernels for the work that the blocks add to a training step.

One kernel adds the blocks of all layers to the diagonals of their weights in one launch; its counterpart restores the
base values. Another kernel computes the gradient of the blocks. Everything else is left to torch. Import this package
through :func:`diablo.ops.backend.kernels_for`.
"""

from __future__ import annotations

import torch

from diablo.layout import BlockLayout
from diablo.ops.kernels.gradient import outer_product
from diablo.ops.kernels.shared import INTERPRETED
from diablo.ops.kernels.table import DiagonalTable

__all__ = ["INTERPRETED", "DiagonalTable", "outer_product", "try_out"]


def try_out(device: torch.device) -> None:
    """Compile a small kernel for ``device`` and launch it. Where Triton cannot, its own error is raised."""
    tokens = torch.zeros(16, 16, device=device)
    outer_product(tokens, tokens, BlockLayout(16, 16, 1), torch.float32)
