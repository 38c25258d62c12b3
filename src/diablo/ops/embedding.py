"""The lookup in a block-diagonal table: each row of the vocabulary has values only in the columns of its block."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diablo.layout import BlockLayout


def block_diagonal_embedding(
    indices: torch.Tensor,
    blocks: torch.Tensor,
    layout: BlockLayout,
    base_output: torch.Tensor,
    *,
    factor: torch.Tensor | float | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> torch.Tensor:
    """Look indices up in a block-diagonal table and add the rows to ``base_output``.

    Row ``t`` of the vocabulary is row ``t % d_in`` of block ``t // d_in``. It is added in the columns of that block.

    Args:
        indices: ``(...)``, integers from 0 to ``layout.in_features - 1``.
        blocks: ``(N, d_in, d_out)``, of ``layout.blocks_shape``; cast to the dtype of ``base_output``.
        layout: the geometry. The inputs are the vocabulary, the outputs are the columns.
        base_output: ``(..., layout.out_features)``; it is overwritten and returned.
        factor: a number that the rows are multiplied by, or a tensor that broadcasts to ``(..., 1)``; 1 where None.
        padding_idx: an index whose row gets no gradient.
        scale_grad_by_freq: divide each row's gradient by how often its index occurs.

    Returns:
        ``base_output``.
    """
    rows = F.embedding(indices, blocks.flatten(0, 1), padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    rows = rows.to(base_output.dtype)
    if factor is not None:
        rows = rows * factor
    columns = (indices // layout.block_in).unsqueeze(-1) * layout.block_out
    columns = columns + torch.arange(layout.block_out, device=indices.device)
    inside = columns < layout.out_features
    # Columns past the edge do not exist. In their place a zero is added to the last column.
    return base_output.scatter_add_(-1, columns.clamp(max=layout.out_features - 1), rows * inside)
