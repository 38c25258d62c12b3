"""Embeddings: blocks over the vocabulary and the hidden size."""

from __future__ import annotations

from typing import Any

import torch

from diablo.ops import block_diagonal_embedding
from diablo.tuner.layers.module import ModuleLayer


class DiabloEmbedding(ModuleLayer):
    """An ``nn.Embedding`` with blocks over the vocabulary and the hidden size.

    The forward takes indices of any shape. Each token trains the columns of its own block alone. The blocks stand
    beside the weight. Dropout leaves out the update of whole tokens.
    """

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        base_layer: Any = self.get_base_layer()
        factor = self.diablo_dropout[adapter_name](result.new_ones(*x.shape, 1))
        # Gemma's embeddings multiply by a constant after the lookup.
        scale = getattr(base_layer, "embed_scale", None)
        if scale is not None:
            factor = factor * scale
        return block_diagonal_embedding(
            x,
            self.diablo_blocks[adapter_name],
            self.diablo_layout[adapter_name],
            result,
            factor=factor.to(result.dtype),
            padding_idx=base_layer.padding_idx,
            scale_grad_by_freq=base_layer.scale_grad_by_freq,
        )
