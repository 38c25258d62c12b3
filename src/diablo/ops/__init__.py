"""The product with the blocks for each kind of layer, its plain reference, and kernels for GPUs."""

from diablo.ops.convolution import block_diagonal_conv
from diablo.ops.embedding import block_diagonal_embedding
from diablo.ops.linear import block_diagonal_linear, block_diagonal_linear_reference
from diablo.ops.weight import add_to_diagonal

__all__ = [
    "add_to_diagonal",
    "block_diagonal_conv",
    "block_diagonal_embedding",
    "block_diagonal_linear",
    "block_diagonal_linear_reference",
]
