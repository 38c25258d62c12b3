"""Geometry of the diagonal blocks of a matrix, or of a stack of them: the one place where it is computed.

The paper (arXiv 2506.03230, section 3) cuts an ``in_features x out_features`` matrix into N x N blocks and trains the N
blocks on the diagonal. Where N does not divide a dimension the blocks are rounded up, the input is thought of as padded
with zeros and the output as cut. No code here pads or cuts anything: the blocks that lie wholly inside the matrix and
the one that its edge may cut through are described as two :class:`Tile`\\ s, which are plain strided views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

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
        row: first row of each stored block that the run has; the rows before it are another process's.
        column: first column, likewise.
    """

    first: int
    count: int
    block_in: int
    block_out: int
    in_start: int
    out_start: int
    row: int = 0
    column: int = 0

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
        return Tile(
            self.first,
            self.count,
            self.block_out,
            self.block_in,
            self.out_start,
            self.in_start,
            self.column,
            self.row,
        )

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
        rows, columns = (self.row, self.row + self.block_in), (self.column, self.column + self.block_out)
        return blocks[..., self.first : self.first + self.count, slice(*rows), slice(*columns)]

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input features that the run reads: ``(tokens, in_features)`` -> ``(count, tokens, block_in)``, a view."""
        return _split(x, self.count, self.in_start, self.block_in)

    def of_input_transposed(self, x: torch.Tensor) -> torch.Tensor:
        """The same as ``(count, block_in, tokens)``."""
        return _split(x, self.count, self.in_start, self.block_in, transposed=True)

    def of_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output features that the run writes: ``(tokens, out_features)`` -> ``(count, tokens, block_out)``."""
        return _split(y, self.count, self.out_start, self.block_out)

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

    def within_outputs(self, start: int, stop: int) -> list[Tile]:
        """The run's parts that write some of the outputs, which are counted from ``start`` on.

        Blocks that lie wholly inside are one run; those that an end cuts through are runs of a part of one block.
        """
        tiles = []
        low, high = max(start, self.out_start), min(stop, self.out_start + self.out_size)
        while low < high:
            index, column = divmod(low - self.out_start, self.block_out)
            whole = 0 if column else (high - low) // self.block_out
            width = self.block_out if whole else min(self.block_out - column, high - low)
            tiles.append(
                replace(
                    self,
                    first=self.first + index,
                    count=whole or 1,
                    block_out=width,
                    in_start=self.in_start + index * self.block_in,
                    out_start=low - start,
                    column=self.column + column,
                )
            )
            low += (whole or 1) * width
        return tiles

    def within_inputs(self, start: int, stop: int) -> list[Tile]:
        """The run's parts that read some of the inputs, which are counted from ``start`` on."""
        return [tile.transposed for tile in self.transposed.within_outputs(start, stop)]


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
        is_even: whether the blocks tile the diagonal exactly, so that every entry of the parameter is in the matrix.

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
    is_even: bool = field(init=False, repr=False, compare=False)

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
        is_even = self.in_features % self.num_blocks == 0 and self.out_features % self.num_blocks == 0
        object.__setattr__(self, "is_even", is_even)

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

    def with_shape(self, shape: tuple[int, ...]) -> BlockLayout | None:
        """The layout of the same matrices whose parameter has a shape; None where no number of blocks gives it.

        Several numbers can give one shape. It is this layout where it does, and otherwise the one of the smallest.
        """
        if shape == self.blocks_shape:
            return self
        # The smallest number is how many blocks are stored.
        stored = shape[-3] if len(shape) >= 3 else 0
        if not 1 <= stored <= self.max_num_blocks:
            return None
        layout = replace(self, num_blocks=stored)
        return layout if layout.blocks_shape == shape else None

    def cut(self, slices: Sequence[tuple[int, int]], along_inputs: bool) -> list[LayoutPart]:
        """The parts of the blocks that lie in slices of the matrix, one for each process that holds a slice.

        Args:
            slices: first feature and the one after the last of each slice, which together are all, in order.
            along_inputs: whether they are slices of the inputs, and not of the outputs.
        """
        parts = [
            LayoutPart(
                self,
                part if along_inputs else (0, self.in_features),
                (0, self.out_features) if along_inputs else part,
            )
            for part in slices
        ]
        most = max(part.num_stored_blocks for part in parts)
        in_order = all(part.first == number * most for number, part in enumerate(parts) if part.tiles)
        if most * len(parts) == self.num_stored_blocks and not in_order:
            # All parts together would have the shape of the whole, and who sees one could take it for the other.
            most += 1
        return [replace(part, num_stored_blocks=most) for part in parts]

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


@dataclass(frozen=True)
class LayoutPart:
    """What a slice of a matrix has of its diagonal blocks, as one process of several holds it (tensor parallelism).

    A block that a slice's end cuts through is stored by both processes, each of which has its own rows or columns of it
    and zeros elsewhere: so the stored blocks of all processes, put where they belong, add up to the whole. To the
    products it is a layout like any other, of the slice's inputs and outputs.

    Args:
        whole: the layout of the whole matrix.
        inputs: first input feature of the slice, and the one after its last.
        outputs: first output feature, and the one after the last.
        num_stored_blocks: blocks in the parameter, at least as many as the slice meets; as many as that where 0.

    Attributes:
        first: index, in the whole, of the first stored block.
        tiles: the slice's blocks and parts of blocks.
    """

    whole: BlockLayout
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    num_stored_blocks: int = 0
    is_even: ClassVar[bool] = False
    first: int = field(init=False, repr=False, compare=False)
    tiles: tuple[Tile, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        met = [
            part
            for tile in self.whole.tiles
            for rows in tile.within_inputs(*self.inputs)
            for part in rows.within_outputs(*self.outputs)
        ]
        first = min((tile.first for tile in met), default=0)
        most = max((tile.first + tile.count - first for tile in met), default=1)
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "tiles", tuple(replace(tile, first=tile.first - first) for tile in met))
        object.__setattr__(self, "num_stored_blocks", max(most, self.num_stored_blocks))

    @property
    def in_features(self) -> int:
        """Inputs of the slice."""
        return self.inputs[1] - self.inputs[0]

    @property
    def out_features(self) -> int:
        """Outputs of the slice."""
        return self.outputs[1] - self.outputs[0]

    @property
    def num_blocks(self) -> int:
        """N of the whole, as the user asked for it."""
        return self.whole.num_blocks

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Shape of the process's parameter: ``(num_stored_blocks, block_in, block_out)``."""
        return self.num_stored_blocks, self.whole.block_in, self.whole.block_out

    @cached_property
    def transposed(self) -> LayoutPart:
        """The part of the map from outputs back to inputs."""
        return LayoutPart(self.whole.transposed, self.outputs, self.inputs, self.num_stored_blocks)

    def taken_from(self, whole: torch.Tensor) -> torch.Tensor:
        """The slice's part of the blocks of the whole matrix: ``whole.blocks_shape`` -> ``blocks_shape``."""
        blocks = whole.new_zeros(self.blocks_shape)
        for tile in self.tiles:
            tile.of_blocks(blocks).copy_(tile.of_blocks(whole[self.first :]))
        return blocks

    def put_into(self, whole: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write the slice's part where it belongs in the blocks of the whole matrix."""
        for tile in self.tiles:
            tile.of_blocks(whole[self.first :]).copy_(tile.of_blocks(blocks))


Layout = BlockLayout | LayoutPart
"""What the products take: the blocks of a matrix, or those of a process's slice of it."""


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _split(features: torch.Tensor, count: int, start: int, size: int, transposed: bool = False) -> torch.Tensor:
    """``(tokens, features)`` -> ``(count, tokens, size)``: runs of neighbouring features from ``start`` on, a view.

    Or ``(count, size, tokens)``, transposed.
    """
    if type(features) is not torch.Tensor:
        # A compiler wants to know which features are read, and not where they lie.
        runs = features.narrow(1, start, count * size).unflatten(1, (count, size))
        return runs.permute(1, 2, 0) if transposed else runs.transpose(0, 1)
    # In one call, since layers with few tokens wait for the calls and not for the products.
    token, feature = features.stride()
    shape, strides = (count, features.shape[0], size), (size * feature, token, feature)
    if transposed:
        shape, strides = (count, size, features.shape[0]), (size * feature, feature, token)
    if start == 0:
        return features.as_strided(shape, strides)
    return features.as_strided(shape, strides, features.storage_offset() + start * feature)
