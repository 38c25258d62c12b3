"""The geometry of the diagonal blocks of a matrix, or of a stack of them; it is computed here and nowhere else.

The paper (arXiv 2506.03230, section 3) cuts an ``in_features x out_features`` matrix into N x N blocks and trains the N
blocks on the diagonal. Where N does not divide a dimension, the size of a block is rounded up. In theory the input is
then padded with zeros and the output is cut. No code here pads or cuts anything. It describes the diagonal as at most
two :class:`Tile`\\ s, whose tensors are plain strided views: the blocks that lie wholly inside the matrix, and the one
block that an edge of the matrix may cut through.
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
    """A tile: a run of diagonal blocks of equal size.

    Its methods give the tile's part of inputs, outputs, weights and parameters as strided views.

    Attributes:
        first: index of the tile's first block.
        count: number of blocks in the tile.
        block_in: rows of each block, along the input.
        block_out: columns of each block, along the output.
        in_start: first input feature that the tile reads.
        out_start: first output feature that the tile writes.
        row: first row of each stored block that belongs to the tile. It is above 0 only in a slice of a matrix, where
            the rows before it belong to another process.
        column: first column of each stored block that belongs to the tile, likewise.
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
        """Number of input features that the tile reads."""
        return self.count * self.block_in

    @property
    def out_size(self) -> int:
        """Number of output features that the tile writes."""
        return self.count * self.block_out

    @property
    def transposed(self) -> Tile:
        """The same tile in the map from outputs back to inputs: inputs and outputs change places."""
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
        """The same tile with fewer and larger blocks: each takes the place of ``size`` neighbours.

        Args:
            size: blocks that become one; it divides ``count``.
        """
        return Tile(
            self.first // size,
            self.count // size,
            size * self.block_in,
            size * self.block_out,
            self.in_start,
            self.out_start,
        )

    def of_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """The tile's part of the parameter, a view.

        Args:
            blocks: ``(*stack, N, d_in, d_out)``.

        Returns:
            ``(*stack, count, block_in, block_out)``.
        """
        rows, columns = (self.row, self.row + self.block_in), (self.column, self.column + self.block_out)
        return blocks[..., self.first : self.first + self.count, slice(*rows), slice(*columns)]

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input features that the tile reads, a view.

        Args:
            x: ``(tokens, in_features)``.

        Returns:
            ``(count, tokens, block_in)``.
        """
        return _split(x, self.count, self.in_start, self.block_in)

    def of_input_transposed(self, x: torch.Tensor) -> torch.Tensor:
        """The same as :meth:`of_input`, transposed: ``(count, block_in, tokens)``."""
        return _split(x, self.count, self.in_start, self.block_in, transposed=True)

    def of_output(self, y: torch.Tensor) -> torch.Tensor:
        """The output features that the tile writes, a view.

        Args:
            y: ``(tokens, out_features)``.

        Returns:
            ``(count, tokens, block_out)``.
        """
        return _split(y, self.count, self.out_start, self.block_out)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The tile's blocks inside a weight.

        Args:
            weight: ``(*stack, out_features, in_features)``, as ``nn.Linear`` holds it, of any strides.

        Returns:
            ``(*stack, count, block_in, block_out)``, a view: writing to it writes to the weight.
        """
        *stack, rows, columns = weight.stride()
        # Where the weight begins in its memory is not asked for: a compiler would break its graph there.
        begun = weight[..., self.out_start :, self.in_start :] if self.out_start or self.in_start else weight
        return begun.as_strided(
            (*weight.shape[:-2], self.count, self.block_in, self.block_out),
            (*stack, self.block_out * rows + self.block_in * columns, columns, rows),
        )

    def within_outputs(self, start: int, stop: int) -> list[Tile]:
        """The parts of this tile that write the outputs ``start`` to ``stop``, as tiles of that slice of the matrix.

        The blocks that lie wholly inside the slice are one tile. A block that an end of the slice cuts through becomes
        a tile of its own, with that part of the block.

        Args:
            start: first output of the slice. The new tiles count their outputs from here.
            stop: the output after the last one.
        """
        tiles: list[Tile] = []
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
        """The parts of this tile that read the inputs ``start`` to ``stop``; see :meth:`within_outputs`."""
        return [tile.transposed for tile in self.transposed.within_outputs(start, stop)]


@dataclass(frozen=True)
class BlockLayout:
    """Where the diagonal blocks of an ``in_features -> out_features`` map lie.

    The sizes follow the authors' layout, so that their checkpoints fit: ``block_in = ceil(in_features / num_blocks)``,
    ``block_out = ceil(out_features / num_blocks)``, and as many blocks as cover the longer side. N need not divide the
    dimensions. Where it does not, the parameter can hold entries, even whole blocks, that lie outside the matrix. Such
    entries have no effect and no gradient.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        num_blocks: N as the user asked for it, from 1 (one block that is the whole matrix) to the smaller dimension.
        stack: how many such matrices there are, along each leading dimension; empty for one matrix.

    Attributes:
        tiles: the diagonal as one tile of whole blocks. Where an edge cuts through a block, a second tile has the part
            of that block that lies inside the matrix.
        is_even: whether ``num_blocks`` divides both dimensions. Every entry of the parameter is then in the matrix.

    Raises:
        TypeError: a size is not an integer.
        ValueError: ``num_blocks`` is less than 1 or exceeds a dimension.
    """

    in_features: int
    out_features: int
    num_blocks: int
    stack: tuple[int, ...] = ()
    # Fields and not cached properties: in Python 3.11 a lock guards a cached property, and torch.compile cannot trace
    # that lock.
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
        """Number of blocks in the parameter (N_eff in the paper).

        It is less than ``num_blocks`` where the rounded-up blocks cover the matrix with fewer.
        """
        return max(_ceil_div(self.in_features, self.block_in), _ceil_div(self.out_features, self.block_out))

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Shape of the parameter: ``(*stack, num_stored_blocks, block_in, block_out)``."""
        return *self.stack, self.num_stored_blocks, self.block_in, self.block_out

    @property
    def num_parameters(self) -> int:
        """Number of entries of the parameter, including those outside the matrix."""
        return math.prod(self.blocks_shape)

    @cached_property
    def transposed(self) -> BlockLayout:
        """The layout of the map from outputs back to inputs. Its blocks are these blocks, each transposed."""
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
        """The layouts of the slices that several processes hold of the matrix, one for each slice.

        Args:
            slices: for each slice its first feature and the feature after its last one. The slices are in order and
                together cover all features.
            along_inputs: True where the inputs are sliced, False where the outputs are.
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
            # All parts together would have the same shape as the whole parameter, with the blocks at other places. One
            # more stored block makes the shapes differ, so that nobody takes one for the other.
            most += 1
        return [replace(part, num_stored_blocks=most) for part in parts]

    def _tiles(self) -> tuple[Tile, ...]:
        # At most one block is cut: an edge passes through the last block of its dimension only, and blocks past the
        # shorter side lie wholly outside the matrix.
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
    """The layout of one slice of a matrix, as one process of several holds it (tensor parallelism).

    The end of a slice may cut through a block. Then both processes store that block: each has its own rows or columns
    of it, and zeros elsewhere. So the stored blocks of all processes, each put in its place, add up to the whole
    parameter. For the products this is a layout like any other, of the slice's inputs and outputs.

    Args:
        whole: the layout of the whole matrix.
        inputs: first input feature of the slice, and the feature after its last one.
        outputs: first output feature of the slice, and the feature after its last one.
        num_stored_blocks: blocks in the process's parameter. A number below that of the blocks that the slice touches
            is raised to it.

    Attributes:
        first: index of the first stored block in the whole matrix.
        tiles: the slice's blocks and parts of blocks.
        is_even: always False, since the slice may have parts of blocks.
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
        """Number of inputs of the slice."""
        return self.inputs[1] - self.inputs[0]

    @property
    def out_features(self) -> int:
        """Number of outputs of the slice."""
        return self.outputs[1] - self.outputs[0]

    @property
    def num_blocks(self) -> int:
        """N of the whole matrix, as the user asked for it."""
        return self.whole.num_blocks

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Shape of the process's parameter: ``(num_stored_blocks, block_in, block_out)``."""
        return self.num_stored_blocks, self.whole.block_in, self.whole.block_out

    @cached_property
    def transposed(self) -> LayoutPart:
        """The layout of the slice in the map from outputs back to inputs."""
        return LayoutPart(self.whole.transposed, self.outputs, self.inputs, self.num_stored_blocks)

    def taken_from(self, whole: torch.Tensor) -> torch.Tensor:
        """The slice's part of the blocks of the whole matrix: ``whole.blocks_shape`` -> ``blocks_shape``."""
        blocks = whole.new_zeros(self.blocks_shape)
        for tile in self.tiles:
            tile.of_blocks(blocks).copy_(tile.of_blocks(whole[self.first :]))
        return blocks

    def put_into(self, whole: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write the slice's part to its place in the blocks of the whole matrix.

        Args:
            whole: ``whole.blocks_shape``; it is written to.
            blocks: ``blocks_shape``, the process's parameter.
        """
        for tile in self.tiles:
            tile.of_blocks(whole[self.first :]).copy_(tile.of_blocks(blocks))


Layout = BlockLayout | LayoutPart
"""What the products take: the layout of a whole matrix, or of one process's slice of it."""


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _split(features: torch.Tensor, count: int, start: int, size: int, transposed: bool = False) -> torch.Tensor:
    """``count`` runs of ``size`` neighbouring features from ``start`` on, a view.

    ``(tokens, features)`` -> ``(count, tokens, size)``, or ``(count, size, tokens)`` where transposed.
    """
    if type(features) is not torch.Tensor:
        # A compiler has to see which features are read; strides would tell it only where they lie in memory.
        runs = features.narrow(1, start, count * size).unflatten(1, (count, size))
        return runs.permute(1, 2, 0) if transposed else runs.transpose(0, 1)
    # One call to torch and not three: with few tokens, a layer's time goes into the calls and not into the products.
    token, feature = features.stride()
    shape, strides = (count, features.shape[0], size), (size * feature, token, feature)
    if transposed:
        shape, strides = (count, size, features.shape[0]), (size * feature, feature, token)
    if start == 0:
        return features.as_strided(shape, strides)
    return features.as_strided(shape, strides, features.storage_offset() + start * feature)
