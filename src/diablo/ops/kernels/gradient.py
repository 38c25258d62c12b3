"""The kernel for the gradient of the blocks: it reads inputs and gradients once, and writes the parameter's dtype."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diablo.layout import Layout, Tile
from diablo.ops.kernels.shared import INTERPRETED, OPTIONS, TILE, TRITON_TYPES, on, rounded
from diablo.ops.tile_product import tile_product

# Programs that fill a large GPU: a little less than two for each of the 132 multiprocessors of an H100. It is a
# constant and does not depend on the GPU at hand, so that the sums of one shape are split alike on every GPU.
PROGRAMS = 256
# Each split writes a partial sum that is read again later. A split of fewer tokens than this does not pay for that.
TOKENS_OF_SPLIT = 256
# For blocks wider than this in both directions, arithmetic and not memory is the limit: the vendors' products are
# faster there.
WIDEST = 256
# Bytes of x and grad_y that one step of the loop over tokens may take. Shared memory holds several steps at a time.
STEP_BYTES = 20480

# Steps whose data shared memory holds at a time, so that loads run ahead of the products. An AMD GPU has less shared
# memory: one load runs ahead there.
STAGES = 2 if torch.version.hip else 4


def outer_product(x: torch.Tensor, grad_y: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The diagonal blocks of ``x^T grad_y``. The same values give the same result to the bit in every call.

    Sums are formed in fp32 and rounded to ``dtype`` once. Two cases are left to torch: fp64, which torch sums in fp64,
    and blocks of more than 256 features in both directions, which torch rounds to the dtype of ``x`` in between.

    Args:
        x: ``(tokens, in_features)``, of any strides; copied where its last stride is not 1.
        grad_y: ``(tokens, out_features)``, of the dtype of ``x``; copied likewise.
        layout: the geometry.
        dtype: dtype of the result.

    Returns:
        ``layout.blocks_shape``, zero where a block lies outside the matrix.
    """
    tiles = layout.tiles
    covered = sum(tile.count * tile.block_in * tile.block_out for tile in tiles)
    if x.shape[0] == 0 or covered < math.prod(layout.blocks_shape):
        # Entries outside the matrix are in no tile: they stay zero.
        grad_blocks = x.new_zeros(layout.blocks_shape, dtype=dtype)
    else:
        grad_blocks = x.new_empty(layout.blocks_shape, dtype=dtype)
    if x.shape[0] == 0:
        return grad_blocks
    ours = x.dtype == grad_y.dtype and x.dtype != torch.float64 and {x.dtype, dtype} <= TRITON_TYPES.keys()
    # A subclass of torch.Tensor, such as a fake or a distributed tensor, need not have memory of its own.
    ours = ours and type(x) is torch.Tensor and type(grad_y) is torch.Tensor
    for tile in tiles:
        target = tile.of_blocks(grad_blocks)
        if ours and min(tile.block_in, tile.block_out) <= WIDEST:
            _launch(_with_unit_stride(x), _with_unit_stride(grad_y), tile, target)
        else:
            target.copy_(tile_product(x, grad_y, tile))
    return grad_blocks


class Plan(NamedTuple):
    """How the gradient of the blocks of one :class:`~diablo.layout.Tile` is divided among programs.

    Each program computes one rectangle of the result, summed over one split of the tokens. Triton calls such a
    rectangle a tile, and so do the names of some variables in this file.

    Attributes:
        group: number of neighbouring blocks that share a rectangle; it divides the number of blocks.
        rows: rows of a rectangle, along the input.
        columns: columns of a rectangle, along the output.
        step: tokens that the loop takes at a time.
        tokens: tokens of a split, a multiple of ``step``.
        splits: number of splits of the tokens.
        warps: warps of a program.
    """

    group: int
    rows: int
    columns: int
    step: int
    tokens: int
    splits: int
    warps: int


@lru_cache(maxsize=4096)
def planned(tokens: int, count: int, block_in: int, block_out: int, bytes_each: int) -> Plan:
    """A division of the work that depends on nothing but shapes.

    The division is not found by timing candidates. Such timings could choose differently in another run: the sums would
    then be formed in another order, and a run could not be repeated to the bit.

    The product is limited by memory, so each input should be read once: a rectangle has the whole block where that fits
    into the registers. Blocks that are smaller than the smallest product of the matrix units share a rectangle with
    their neighbours, and only the diagonal of the rectangle's product is kept. Where the rectangles are too few to fill
    the GPU, the tokens are split.

    Args:
        tokens: number of tokens, at least 1.
        count: number of blocks.
        block_in: rows of a block.
        block_out: columns of a block.
        bytes_each: size of an entry of ``x``: 2 or 4.
    """
    group = _grouped(count, block_in, block_out)
    rows, columns = (min(256, max(16, triton.next_power_of_2(group * size))) for size in (block_in, block_out))
    # The matrix units have no exact product of fp32. The ordinary units' product takes more registers.
    largest = 64 * 256 if bytes_each == 2 else 64 * 64
    while rows * columns > largest:
        rows, columns = (rows, columns // 2) if columns > rows else (rows // 2, columns)
    step = next(step for step in (64, 32, 16) if step == 16 or step * (rows + columns) * bytes_each <= STEP_BYTES)
    programs = count // group * triton.cdiv(group * block_in, rows) * triton.cdiv(group * block_out, columns)
    splits = max(1, min(PROGRAMS // programs, tokens // TOKENS_OF_SPLIT))
    tokens_of_split = triton.cdiv(triton.cdiv(tokens, splits), step) * step
    return Plan(
        group,
        rows,
        columns,
        step,
        tokens_of_split,
        triton.cdiv(tokens, tokens_of_split),
        8 if rows * columns > 64 * 128 else 4,
    )


def _grouped(count: int, block_in: int, block_out: int) -> int:
    """How many neighbouring blocks share a rectangle of at most 64 x 64.

    Loads of 4 bytes and more can be issued ahead of the product; narrower ones cannot. So the best groups are those
    whose features start at multiples of 8, then those at multiples of 4, and so on. Among equally good groups the
    largest is taken.
    """
    most = max(1, 64 // max(block_in, block_out))
    return max(
        (size for size in range(1, most + 1) if count % size == 0),
        key=lambda size: (math.gcd(size * block_in, size * block_out, 8), size),
    )


def _launch(x: torch.Tensor, grad_y: torch.Tensor, tile: Tile, target: torch.Tensor) -> None:
    """Write the product of one tile into ``target``, ``(count, block_in, block_out)``, whose last stride is 1."""
    tokens, (count, block_in, block_out) = x.shape[0], target.shape
    plan = planned(tokens, count, block_in, block_out, x.element_size())
    tiles = triton.cdiv(plan.group * block_in, plan.rows) * triton.cdiv(plan.group * block_out, plan.columns)
    partial = target
    if plan.splits > 1:
        partial = x.new_empty((plan.splits, *target.shape), dtype=torch.float32)
    with on(x.device):
        _outer_product[(count // plan.group * tiles, plan.splits)](
            x[:, tile.in_start :] if tile.in_start else x,
            grad_y[:, tile.out_start :] if tile.out_start else grad_y,
            partial,
            tokens,
            plan.tokens,
            x.stride(0),
            grad_y.stride(0),
            partial.stride(0) if plan.splits > 1 else 0,
            block_stride=partial.stride(-3),
            row_stride=partial.stride(-2),
            block_in=block_in,
            block_out=block_out,
            group=plan.group,
            rows=plan.rows,
            columns=plan.columns,
            step=plan.step,
            widened=INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=plan.warps,
            num_stages=STAGES,
            **OPTIONS,
        )
        if plan.splits > 1:
            splits = triton.next_power_of_2(plan.splits)
            width = max(32, TILE // splits)
            _add_partial[(triton.cdiv(target.numel(), width),)](
                partial,
                target,
                plan.splits,
                target.numel(),
                block_stride=target.stride(0),
                row_stride=target.stride(1),
                block_in=block_in,
                block_out=block_out,
                splits_tile=splits,
                width=width,
                **OPTIONS,
            )


def _with_unit_stride(features: torch.Tensor) -> torch.Tensor:
    return features if features.stride(1) == 1 or features.shape[1] == 1 else features.contiguous()


@triton.jit(do_not_specialize=["tokens", "tokens_of_split", "split_stride"])
def _outer_product(
    x: tl.tensor,
    grad_y: tl.tensor,
    target: tl.tensor,
    tokens: tl.tensor,
    tokens_of_split: tl.tensor,
    x_stride: tl.tensor,
    grad_stride: tl.tensor,
    split_stride: tl.tensor,
    block_stride: tl.constexpr,
    row_stride: tl.constexpr,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
    group: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    step: tl.constexpr,
    widened: tl.constexpr,
) -> None:
    """One rectangle of the product of a group of blocks, summed over one split of the tokens.

    The sizes of the blocks are constants for the compiler. So it sees how many features it can load at once, and it
    does not need registers for the addresses of the result.
    """
    tiles_down: tl.constexpr = (group * block_in + rows - 1) // rows
    tiles_across: tl.constexpr = (group * block_out + columns - 1) // columns
    # The rectangles of a group come one after the other: they read the same features, which are still in the cache.
    first = tl.program_id(0) // (tiles_down * tiles_across)
    tile = tl.program_id(0) % (tiles_down * tiles_across)
    row = (tile // tiles_across) * rows + tl.arange(0, rows)
    column = (tile % tiles_across) * columns + tl.arange(0, columns)
    in_rows = row < group * block_in
    in_columns = column < group * block_out

    split = tl.program_id(1)
    start = split * tokens_of_split
    stop = tl.minimum(tokens, start + tokens_of_split)
    token = tl.arange(0, step)
    # In a long batch, a row can lie more than 2^31 entries from the first one.
    at = (start + token).to(tl.int64)[:, None]
    inputs = x + at * x_stride + (first * (group * block_in) + row)[None, :]
    outputs = grad_y + at * grad_stride + (first * (group * block_out) + column)[None, :]
    x_step = tl.cast(x_stride, tl.int64) * step
    grad_step = tl.cast(grad_stride, tl.int64) * step
    total = tl.zeros((rows, columns), dtype=tl.float32)
    for now in range(start, stop, step):
        live = (now + token < stop)[:, None]
        left = tl.load(inputs, mask=live & in_rows[None, :], other=0.0)
        right = tl.load(outputs, mask=live & in_columns[None, :], other=0.0)
        if widened:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        inputs += x_step
        outputs += grad_step

    place = target + split.to(tl.int64) * split_stride
    block = first.to(tl.int64) * group * block_stride
    inside = in_rows[:, None] & in_columns[None, :]
    if group == 1:
        offsets = row[:, None] * row_stride + column[None, :]
    else:
        # Products of one block's inputs with another block's outputs are not part of the result.
        of_row = row // block_in
        inside = inside & (of_row[:, None] == (column // block_out)[None, :])
        down = of_row.to(tl.int64) * block_stride + (row % block_in) * row_stride
        offsets = down[:, None] + (column % block_out)[None, :]
    tl.store(place + block + offsets, rounded(total, target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _add_partial(
    partial: tl.tensor,
    target: tl.tensor,
    splits: tl.tensor,
    size: tl.tensor,
    block_stride: tl.constexpr,
    row_stride: tl.constexpr,
    block_in: tl.constexpr,
    block_out: tl.constexpr,
    splits_tile: tl.constexpr,
    width: tl.constexpr,
) -> None:
    """The sum of the splits' products, in an order that depends only on the number of splits."""
    entry = tl.program_id(0) * width + tl.arange(0, width)
    split = tl.arange(0, splits_tile)
    inside = (split < splits)[:, None] & (entry < size)[None, :]
    values = tl.load(partial + split.to(tl.int64)[:, None] * size + entry[None, :], mask=inside, other=0.0)
    total = tl.sum(values, axis=0)
    block = entry // (block_in * block_out)
    within = entry % (block_in * block_out)
    offsets = block.to(tl.int64) * block_stride + (within // block_out) * row_stride + within % block_out
    tl.store(target + offsets, rounded(total, target.dtype.element_ty), mask=entry < size)
