"""Geometry of the diagonal blocks of a matrix, or of a stack of them: the one place where it is computed.

The paper (arXiv 2506.03230, section 3) cuts an ``in_features x out_features`` matrix into N x N blocks and trains the N
blocks on the diagonal. Where N does not divide a dimension the blocks are rounded up, the input is thought of as padded
with zeros and the output as cut. No code here pads or cuts anything: the blocks that lie wholly inside the matrix and
the one that its edge may cut through are described as two :class:`Tile`\\ s, which are plain strided views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch


@dataclass(frozen=True)
class Tile:
    """A run of equally sized diagonal blocks, seen as strided views into inputs, outputs, weights and parameters.

    Attributes:
        first: index of the run's first block.
        count: number of blocks in the run.
        block_in: rows of each block, along the input.
        block_out: columns of each block, along the output.
        in_start: first input feature that the run reads.
        out_start: first output feature that the run writes.
    """

    first: int
    count: int
    block_in: int
    block_out: int
    in_start: int
    out_start: int

    @property
    def in_size(self) -> int:
        """Input features that the run reads."""
        return self.count * self.block_in

    @property
    def out_size(self) -> int:
        """Output features that the run writes."""
        return self.count * self.block_out

    @property
    def transposed(self) -> Tile:
        """The same run as the map from outputs back to inputs has it."""
        return Tile(self.first, self.count, self.block_out, self.block_in, self.out_start, self.in_start)

    def grouped(self, size: int) -> Tile:
        """The same run as fewer and larger blocks, each made of ``size`` neighbours, a divisor of ``count``."""
        return Tile(
            self.first // size,
            self.count // size,
            size * self.block_in,
            size * self.block_out,
            self.in_start,
            self.out_start,
        )

    def of_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """The run's part of the parameter: ``(*stack, N, d_in, d_out)`` -> ``(*stack, count, block_in, block_out)``.

        A view.
        """
        return blocks[..., self.first : self.first + self.count, : self.block_in, : self.block_out]

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input features that the run reads: ``(tokens, in_features)`` -> ``(count, tokens, block_in)``, a view."""
        return self._split(x, self.in_start, self.block_in)

    def of_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output features that the run writes: ``(tokens, out_features)`` -> ``(count, tokens, block_out)``."""
        return self._split(y, self.out_start, self.block_out)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The run's blocks inside a weight.

        Args:
            weight: ``(*stack, out_features, in_features)``, as ``nn.Linear`` holds it, of any strides.

        Returns:
            ``(*stack, count, block_in, block_out)``, a view: writing to it writes to the weight.
        """
        *stack, rows, columns = weight.stride()
        return weight.as_strided(
            (*weight.shape[:-2], self.count, self.block_in, self.block_out),
            (*stack, self.block_out * rows + self.block_in * columns, columns, rows),
            weight.storage_offset() + self.out_start * rows + self.in_start * columns,
        )

    def _split(self, features: torch.Tensor, start: int, size: int) -> torch.Tensor:
        run = features[:, start : start + self.count * size]
        return run.unflatten(1, (self.count, size)).transpose(0, 1)


@dataclass(frozen=True)
class BlockLayout:
    """Where the diagonal blocks of an ``in_features -> out_features`` map lie, ragged sizes included.

    The sizes follow the authors' layout, so that their checkpoints fit: ``block_in = ceil(in_features / num_blocks)``,
    ``block_out = ceil(out_features / num_blocks)``, and as many blocks as cover the longer side. With ragged sizes the
    parameter can hold entries (even whole blocks) that lie outside the matrix; they have no effect and no gradient.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        num_blocks: N as the user asked for it, from 1 (the whole matrix) to the smaller dimension.
        stack: how many such matrices there are, along each leading dimension; empty for one matrix.

    Attributes:
        tiles: the diagonal as one run of whole blocks and, where an edge cuts through a block, that block's inner part.

    Raises:
        TypeError: a size is not an integer.
        ValueError: ``num_blocks`` is less than 1 or exceeds a dimension.
    """

    in_features: int
    out_features: int
    num_blocks: int
    stack: tuple[int, ...] = ()
    # Not a cached property: torch.compile cannot trace the lock that guards one in Python 3.11.
    tiles: tuple[Tile, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "num_blocks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}.")
        if not 1 <= self.num_blocks <= self.max_num_blocks:
            raise ValueError(
                f"num_blocks={self.num_blocks} does not fit a matrix of in_features={self.in_features}, "
                f"out_features={self.out_features}: it takes from 1 to {self.max_num_blocks} blocks."
            )
        object.__setattr__(self, "tiles", self._tiles())

    @property
    def max_num_blocks(self) -> int:
        """The largest N that the matrix takes: its smaller dimension."""
        return min(self.in_features, self.out_features)

    @property
    def block_in(self) -> int:
        """Rows of a block, along the input (d1 in the paper)."""
        return _ceil_div(self.in_features, self.num_blocks)

    @property
    def block_out(self) -> int:
        """Columns of a block, along the output (d2 in the paper)."""
        return _ceil_div(self.out_features, self.num_blocks)

    @property
    def num_stored_blocks(self) -> int:
        """Blocks in the parameter (N_eff in the paper); less than ``num_blocks`` where rounding up covers sooner."""
        return max(_ceil_div(self.in_features, self.block_in), _ceil_div(self.out_features, self.block_out))

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Shape of the parameter: ``(*stack, num_stored_blocks, block_in, block_out)``."""
        return *self.stack, self.num_stored_blocks, self.block_in, self.block_out

    @property
    def num_parameters(self) -> int:
        """Entries of the parameter, those outside the matrix included."""
        return math.prod(self.blocks_shape)

    @cached_property
    def transposed(self) -> BlockLayout:
        """The layout of the map from outputs back to inputs, whose blocks are these, each transposed."""
        return BlockLayout(self.out_features, self.in_features, self.num_blocks, self.stack)

    def _tiles(self) -> tuple[Tile, ...]:
        """At most one block is cut: an edge passes through the last block of its dimension only, and blocks past the
        shorter side lie wholly outside the matrix.
        """
        whole = min(self.in_features // self.block_in, self.out_features // self.block_out)
        tiles = [Tile(0, whole, self.block_in, self.block_out, 0, 0)]
        in_start, out_start = whole * self.block_in, whole * self.block_out
        rest_in = min(self.block_in, self.in_features - in_start)
        rest_out = min(self.block_out, self.out_features - out_start)
        if rest_in and rest_out:
            tiles.append(Tile(whole, 1, rest_in, rest_out, in_start, out_start))
        return tuple(tiles)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
