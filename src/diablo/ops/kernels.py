"""Triton kernels for what a training step does with blocks beside the products of the model itself.

One writes the blocks of all layers onto the diagonals of their weights in one launch. The other is the gradient of the
blocks, which reads the inputs and the outputs' gradient once and writes the parameter's dtype. Everything else is
left to torch. Import the module through :func:`diablo.ops.backend.kernels_for`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diablo.layout import BlockLayout, Layout, Tile
from diablo.ops.linear import _tile_product

TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# A row of the table: three addresses, three sizes, three times three strides, and which tensors lie crosswise.
ROW = tl.constexpr(16)
BLOCKS_CROSSWISE = tl.constexpr(1)
SAVED_CROSSWISE = tl.constexpr(2)

# Entries of a program's tile of the table and warps that share it: each thread has 8, whose addresses in three tensors
# still leave registers for two programs on a multiprocessor.
TILE, WARPS = 2048, 8

# Triton 3.9 warns where it is not said whether it may fuse products with sums, and 3.10 does not do so by itself.
OPTIONS = {"enable_fp_fusion": True}

# Programs that fill a large GPU: two for each of the 132 multiprocessors of an H100, or a little less. A constant and
# not the number of the GPU at hand, so that the sums of one shape are split alike everywhere.
PROGRAMS = 256
# Fewer tokens than this are not worth the partial sums that a split of them writes and reads again.
TOKENS_OF_SPLIT = 256
# Blocks wider than this in both directions are limited by arithmetic and not by memory: vendors' products are faster.
WIDEST = 256
# Bytes of x and grad_y that one step of the loop over tokens holds, several times over, in shared memory.
STEP_BYTES = 20480


class DiagonalTable:
    """The diagonals of many weights, written and restored in one launch for all of equal dtypes.

    The constructor puts addresses, sizes and strides into tensors on the device. ``write`` and ``restore`` only launch
    kernels: they allocate and copy nothing, so that a CUDA graph can record them. The table keeps the tensors alive; it
    does not notice where a module is given other ones later, so whoever does that makes a new table. Autograd is not
    told of what is written.

    ``write`` adds in fp32, or in fp64 where the weight or the blocks are fp64, and rounds once to the weight's dtype.

    Args:
        weights: views into the weights, each ``(*stack, count, block_in, block_out)`` of 3 to 5 dimensions and of any
            strides; fp16, bf16, fp32 or fp64. No two may overlap.
        blocks: what is added, of the same shapes; any of these dtypes and any strides.
        saved: where the base values go, of the same shapes and of the weights' dtypes; any strides. Those that have a
            stride of 1 where the weights have it are fastest.

    Raises:
        ValueError: the lists differ in length, a shape does not fit or has too few or many dimensions, or not all
            tensors are on one device.
        TypeError: a dtype is not one of the four, or ``saved`` has another one than the weight.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], saved: Sequence[torch.Tensor]
    ) -> None:
        rows = list(zip(weights, blocks, saved, strict=True))
        for row in rows:
            _check_row(*row)
        devices = {tensor.device for row in rows for tensor in row}
        if len(devices) > 1:
            raise ValueError(f"The tensors of one table must be on one device, got {sorted(map(str, devices))}.")
        self._rows = rows
        by_dtypes: dict[tuple[torch.dtype, torch.dtype], list[list[int]]] = {}
        for weight, block, save in rows:
            entries = by_dtypes.setdefault((weight.dtype, block.dtype), [])
            entries.extend(_described(*matrices) for matrices in _unstacked(weight, block, save))
        self._groups = [
            _Group.of(entries, *dtypes, device=next(iter(devices))) for dtypes, entries in by_dtypes.items() if entries
        ]

    def write(self) -> None:
        """Save the weights' values, then make them the sum of these and the blocks.

        Twice without :meth:`restore` in between saves the first sum: the base values are lost.
        """
        for group in self._groups:
            with _on(group.table.device):
                _write[group.grid](
                    group.table,
                    group.programs,
                    weight_type=TRITON_TYPES[group.weight_dtype],
                    blocks_type=TRITON_TYPES[group.blocks_dtype],
                    sum_type=tl.float64 if torch.float64 in (group.weight_dtype, group.blocks_dtype) else tl.float32,
                    slow_tile=TILE // group.fast_tile,
                    fast_tile=group.fast_tile,
                    num_warps=WARPS,
                    **OPTIONS,
                )

    def restore(self) -> None:
        """Write the saved values back, to the bit."""
        for group in self._groups:
            with _on(group.table.device):
                _restore[group.grid](
                    group.table,
                    group.programs,
                    weight_type=TRITON_TYPES[group.weight_dtype],
                    slow_tile=TILE // group.fast_tile,
                    fast_tile=group.fast_tile,
                    num_warps=WARPS,
                    **OPTIONS,
                )


def outer_product(x: torch.Tensor, grad_y: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """The diagonal blocks of ``x^T grad_y``, the same to the bit whenever it is called with the same values.

    Sums are formed in fp32 and rounded to ``dtype`` once. Left to torch are fp64, which is summed in fp64, and blocks
    of more than 256 features in both directions, which are rounded to the dtype of ``x`` in between.

    Args:
        x: ``(tokens, in_features)``, of any strides; copied where the last is not 1.
        grad_y: ``(tokens, out_features)``, of the dtype of ``x``, likewise.
        layout: the geometry.
        dtype: dtype of the result.

    Returns:
        ``layout.blocks_shape``, zero where a block lies outside the matrix.
    """
    tiles = layout.tiles
    covered = sum(tile.count * tile.block_in * tile.block_out for tile in tiles)
    if x.shape[0] == 0 or covered < math.prod(layout.blocks_shape):
        # Entries outside the matrix are in no tile: they keep the zero.
        grad_blocks = x.new_zeros(layout.blocks_shape, dtype=dtype)
    else:
        grad_blocks = x.new_empty(layout.blocks_shape, dtype=dtype)
    if x.shape[0] == 0:
        return grad_blocks
    ours = x.dtype == grad_y.dtype and x.dtype != torch.float64 and {x.dtype, dtype} <= TRITON_TYPES.keys()
    # A subclass (a fake or a distributed tensor) has no memory of its own.
    ours = ours and type(x) is torch.Tensor and type(grad_y) is torch.Tensor
    for tile in tiles:
        target = tile.of_blocks(grad_blocks)
        if ours and min(tile.block_in, tile.block_out) <= WIDEST:
            _launch(_with_unit_stride(x), _with_unit_stride(grad_y), tile, target)
        else:
            target.copy_(_tile_product(x, grad_y, tile))
    return grad_blocks


def try_out(device: torch.device) -> None:
    """Compile a small kernel for ``device`` and launch it; whatever Triton raises where it cannot is raised."""
    tokens = torch.zeros(16, 16, device=device)
    outer_product(tokens, tokens, BlockLayout(16, 16, 1), torch.float32)


class Plan(NamedTuple):
    """How the gradient of a run of blocks is divided among programs.

    Attributes:
        group: neighbouring blocks that share a tile, a divisor of their number.
        rows: rows of a tile, along the input.
        columns: columns of a tile, along the output.
        step: tokens that the loop takes at a time.
        tokens: tokens of a split, a multiple of ``step``.
        splits: in how many the tokens are split.
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

    It is not found by timing candidates: another choice in another run would add in another order, and a run could not
    be repeated to the bit.

    The product is limited by memory, so each input should be read once: a tile has the whole block where that fits the
    registers. Blocks that are smaller than the smallest product of the matrix units share a tile with their neighbours,
    of which the diagonal is kept. Where the tiles are too few to fill the GPU the tokens are split.

    Args:
        tokens: number of tokens, at least 1.
        count: number of blocks.
        block_in: rows of a block.
        block_out: columns of a block.
        bytes_each: size of an entry of ``x``: 2 or 4.
    """
    group = _grouped(count, block_in, block_out)
    rows, columns = (min(256, max(16, triton.next_power_of_2(group * size))) for size in (block_in, block_out))
    # fp32 has no exact product on matrix units: the ordinary units' take more registers.
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
    """How many neighbours share a tile of at most 64 x 64.

    Loads of 4 bytes and more can be issued ahead of the product; narrower ones cannot. So runs of features that start
    at multiples of 8 are best, then those at multiples of 4, and so on; among equals the larger tile is.
    """
    most = max(1, 64 // max(block_in, block_out))
    return max(
        (size for size in range(1, most + 1) if count % size == 0),
        key=lambda size: (math.gcd(size * block_in, size * block_out, 8), size),
    )


def _launch(x: torch.Tensor, grad_y: torch.Tensor, tile: Tile, target: torch.Tensor) -> None:
    """Write one run's product into ``target``, ``(count, block_in, block_out)``, whose last stride is 1."""
    tokens, (count, block_in, block_out) = x.shape[0], target.shape
    plan = planned(tokens, count, block_in, block_out, x.element_size())
    tiles = triton.cdiv(plan.group * block_in, plan.rows) * triton.cdiv(plan.group * block_out, plan.columns)
    partial = target
    if plan.splits > 1:
        partial = x.new_empty((plan.splits, *target.shape), dtype=torch.float32)
    with _on(x.device):
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


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


class _Group(NamedTuple):
    """The rows of a table that one launch takes.

    Attributes:
        table: int64, ``(rows, 16)``, on the device.
        programs: int32, ``(programs, 2)``, on the device: for each program its row and which tile of the row.
    """

    table: torch.Tensor
    programs: torch.Tensor
    weight_dtype: torch.dtype
    blocks_dtype: torch.dtype
    fast_tile: int

    @property
    def grid(self) -> tuple[int]:
        return (self.programs.shape[0],)

    @classmethod
    def of(
        cls, entries: list[list[int]], weight_dtype: torch.dtype, blocks_dtype: torch.dtype, device: torch.device
    ) -> _Group:
        table = torch.tensor(entries, dtype=torch.int64)
        count, slow, fast = table[:, 3:6].unbind(1)
        # 64 entries of 16 bits are the 128 bytes that a warp loads at once; of narrower blocks there are more rows.
        fast_tile = min(64, max(16, triton.next_power_of_2(int(fast.max()))))
        tiles = _ceil_div(count * slow, TILE // fast_tile) * _ceil_div(fast, fast_tile)
        row = torch.repeat_interleave(torch.arange(len(entries)), tiles)
        first = tiles.cumsum(0) - tiles
        programs = torch.stack([row, torch.arange(len(row)) - first[row]], dim=1).to(torch.int32)
        return cls(table.to(device), programs.to(device), weight_dtype, blocks_dtype, fast_tile)


def _check_row(weight: torch.Tensor, blocks: torch.Tensor, saved: torch.Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (weight, blocks, saved)]
    if len(set(shapes)) > 1 or not 3 <= weight.dim() <= 5:
        raise ValueError(
            f"weight, blocks and saved must have one shape (*stack, count, block_in, block_out) of 3 to 5 dimensions, "
            f"got {shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    for dtype in (weight.dtype, blocks.dtype):
        if dtype not in TRITON_TYPES:
            raise TypeError(f"Diagonals are written in {[str(known) for known in TRITON_TYPES]}, not in {dtype}.")
    if saved.dtype != weight.dtype:
        raise TypeError(f"saved is {saved.dtype} and the weight {weight.dtype}; they must have one dtype.")


def _unstacked(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equally shaped tensors as sets of three dimensions each, without empty ones."""
    if tensors[0].numel() == 0:
        return
    if tensors[0].dim() == 3:
        yield tensors
        return
    for parts in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
        yield from _unstacked(*parts)


def _described(weight: torch.Tensor, blocks: torch.Tensor, saved: torch.Tensor) -> list[int]:
    """A row of the table. Its last size and stride are those along which the weight's entries lie close together."""
    tensors = [weight, blocks, saved]
    if _is_crosswise(weight):
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    flags = BLOCKS_CROSSWISE.value * _is_crosswise(tensors[1]) + SAVED_CROSSWISE.value * _is_crosswise(tensors[2])
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    return [*(tensor.data_ptr() for tensor in tensors), *tensors[0].shape, *strides, flags]


def _is_crosswise(blocks: torch.Tensor) -> bool:
    """Whether the entries of ``(count, slow, fast)`` lie closer together along the second dimension."""
    _, slow, fast = blocks.shape
    return slow > 1 and (fast == 1 or blocks.stride(1) < blocks.stride(2))


def _ceil_div(numerator: torch.Tensor, denominator: int) -> torch.Tensor:
    return (numerator + denominator - 1) // denominator


@triton.jit
def _write(
    table: tl.tensor,
    programs: tl.tensor,
    weight_type: tl.constexpr,
    blocks_type: tl.constexpr,
    sum_type: tl.constexpr,
    slow_tile: tl.constexpr,
    fast_tile: tl.constexpr,
) -> None:
    entry, count, inner, fast, in_slow, in_fast = _place(table, programs, slow_tile, fast_tile)
    flags = tl.load(entry + 15)
    weight = tl.load(entry).to(tl.pointer_type(weight_type))
    blocks = tl.load(entry + 1).to(tl.pointer_type(blocks_type))
    saved = tl.load(entry + 2).to(tl.pointer_type(weight_type))
    base = _read(weight, entry + 6, count, inner, fast, in_slow, in_fast, 0)
    added = _read(blocks, entry + 9, count, inner, fast, in_slow, in_fast, flags & BLOCKS_CROSSWISE)
    _store(saved, entry + 12, base, count, inner, fast, in_slow, in_fast, flags & SAVED_CROSSWISE)
    total = _rounded(base.to(sum_type) + added.to(sum_type), weight_type)
    _store(weight, entry + 6, total, count, inner, fast, in_slow, in_fast, 0)


@triton.jit
def _restore(
    table: tl.tensor,
    programs: tl.tensor,
    weight_type: tl.constexpr,
    slow_tile: tl.constexpr,
    fast_tile: tl.constexpr,
) -> None:
    entry, count, inner, fast, in_slow, in_fast = _place(table, programs, slow_tile, fast_tile)
    flags = tl.load(entry + 15)
    weight = tl.load(entry).to(tl.pointer_type(weight_type))
    saved = tl.load(entry + 2).to(tl.pointer_type(weight_type))
    base = _read(saved, entry + 12, count, inner, fast, in_slow, in_fast, flags & SAVED_CROSSWISE)
    _store(weight, entry + 6, base, count, inner, fast, in_slow, in_fast, 0)


@triton.jit
def _place(table: tl.tensor, programs: tl.tensor, slow_tile: tl.constexpr, fast_tile: tl.constexpr) -> tl.tensor:
    """The program's row of the table and its tile there: indices along each dimension, and which are inside.

    The tile runs along the blocks and their slow dimension as if these were one, so that small blocks fill it.
    """
    program = programs + tl.program_id(0).to(tl.int64) * 2
    entry = table + tl.load(program).to(tl.int64) * ROW
    tile = tl.load(program + 1)
    count = tl.load(entry + 3).to(tl.int32)
    slow_size = tl.load(entry + 4).to(tl.int32)
    fast_size = tl.load(entry + 5).to(tl.int32)
    across = tl.cdiv(fast_size, fast_tile)
    slow = (tile // across) * slow_tile + tl.arange(0, slow_tile)
    fast = (tile % across) * fast_tile + tl.arange(0, fast_tile)
    return entry, slow // slow_size, slow % slow_size, fast, slow < count * slow_size, fast < fast_size


@triton.jit
def _read(
    address: tl.tensor,
    strides: tl.tensor,
    block: tl.tensor,
    inner: tl.tensor,
    fast: tl.tensor,
    in_slow: tl.tensor,
    in_fast: tl.tensor,
    crosswise: tl.tensor,
) -> tl.tensor:
    """A ``(slow, fast)`` tile. Threads are put along a tile's last dimension, so a tensor that lies crosswise is read
    as its transpose.
    """
    down, across = _offsets(strides, block, inner, fast)
    if crosswise != 0:
        turned = tl.load(address + (across[:, None] + down[None, :]), mask=in_fast[:, None] & in_slow[None, :])
        values = tl.trans(turned)
    else:
        values = tl.load(address + (down[:, None] + across[None, :]), mask=in_slow[:, None] & in_fast[None, :])
    return values


@triton.jit
def _store(
    address: tl.tensor,
    strides: tl.tensor,
    values: tl.tensor,
    block: tl.tensor,
    inner: tl.tensor,
    fast: tl.tensor,
    in_slow: tl.tensor,
    in_fast: tl.tensor,
    crosswise: tl.tensor,
) -> None:
    down, across = _offsets(strides, block, inner, fast)
    if crosswise != 0:
        turned = address + (across[:, None] + down[None, :])
        tl.store(turned, tl.trans(values), mask=in_fast[:, None] & in_slow[None, :])
    else:
        tl.store(address + (down[:, None] + across[None, :]), values, mask=in_slow[:, None] & in_fast[None, :])


@triton.jit
def _offsets(strides: tl.tensor, block: tl.tensor, inner: tl.tensor, fast: tl.tensor) -> tl.tensor:
    """int64 offsets along both dimensions of a tile."""
    down = block.to(tl.int64) * tl.load(strides) + inner.to(tl.int64) * tl.load(strides + 1)
    return down, fast.to(tl.int64) * tl.load(strides + 2)


@triton.jit
def _rounded(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 or fp64 values in ``dtype``, to the nearest, ties to even, as torch rounds them."""
    if dtype == tl.bfloat16:
        # Written out because Triton's interpreter cuts the digits off: so what is tested there is what a GPU does.
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, upper)  # not a number
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if dtype == tl.float16:
        # torch goes from fp64 to fp16 through fp32.
        return values.to(tl.float32).to(tl.float16)
    return values.to(dtype)


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
    """One tile of a group of blocks, summed over one split of the tokens.

    The blocks' sizes are known to the compiler: from them it sees how many features it can load at once, and it need
    hold no addresses of the result in registers.
    """
    tiles_down: tl.constexpr = (group * block_in + rows - 1) // rows
    tiles_across: tl.constexpr = (group * block_out + columns - 1) // columns
    # The tiles of a block come one after the other: they read the same features, which are still in the cache.
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
    # Rows of long batches are more than 2^31 entries from the first.
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
        # Products of one block's inputs with another's outputs are left out.
        of_row = row // block_in
        inside = inside & (of_row[:, None] == (column // block_out)[None, :])
        down = of_row.to(tl.int64) * block_stride + (row % block_in) * row_stride
        offsets = down[:, None] + (column % block_out)[None, :]
    tl.store(place + block + offsets, _rounded(total, target.dtype.element_ty), mask=inside)


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
    """The sum of the splits' products, in an order that depends on nothing but their number."""
    entry = tl.program_id(0) * width + tl.arange(0, width)
    split = tl.arange(0, splits_tile)
    inside = (split < splits)[:, None] & (entry < size)[None, :]
    values = tl.load(partial + split.to(tl.int64)[:, None] * size + entry[None, :], mask=inside, other=0.0)
    total = tl.sum(values, axis=0)
    block = entry // (block_in * block_out)
    within = entry % (block_in * block_out)
    offsets = block.to(tl.int64) * block_stride + (within // block_out) * row_stride + within % block_out
    tl.store(target + offsets, _rounded(total, target.dtype.element_ty), mask=entry < size)


INTERPRETED = not isinstance(_write, triton.JITFunction)
"""Whether Triton was imported with ``TRITON_INTERPRET=1``: then the kernels run on the CPU, slowly."""

# Loads that are under way while a step is computed: what an AMD GPU has of shared memory takes one.
STAGES = 2 if torch.version.hip else 4
