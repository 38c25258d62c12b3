"""One launch that adds the blocks of all layers to the diagonals of their weights, and one that restores these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diablo.ops.kernels.shared import OPTIONS, TILE, TRITON_TYPES, on, rounded

# A row of the table has 16 numbers: the addresses of weight, blocks and saved; three sizes; three strides for each of
# the three tensors; and flags that say which tensors lie crosswise to the weight.
ROW = tl.constexpr(16)
BLOCKS_CROSSWISE = tl.constexpr(1)
SAVED_CROSSWISE = tl.constexpr(2)

# Warps that share a program's 2,048 entries (TILE). Each thread then has 8 entries, and their addresses in three
# tensors leave enough registers for two programs on a multiprocessor.
WARPS = 8


class DiagonalTable:
    """The diagonals of many weights, written and restored in one launch for each pair of dtypes.

    The constructor puts addresses, sizes and strides into tensors on the device. ``write`` and ``restore`` only launch
    kernels: they allocate and copy nothing, so that a CUDA graph can record them. The table keeps its tensors alive. It
    does not notice where a module is given other tensors later; whoever does that needs a new table. Autograd does not
    notice the writes.

    ``write`` adds in fp32, or in fp64 where the weight or the blocks are fp64, and rounds once to the weight's dtype.

    Args:
        weights: views into the weights, each ``(*stack, count, block_in, block_out)`` of 3 to 5 dimensions and of any
            strides; fp16, bf16, fp32 or fp64. No two may overlap.
        blocks: what is added, of the same shapes; any of these dtypes and any strides.
        saved: where the base values go, of the same shapes and of the weights' dtypes; any strides. It is fastest where
            the strides are 1 in the same dimensions as those of the weights.

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
        """Save the weights' values, then add the blocks to them.

        Call :meth:`restore` before the next :meth:`write`: otherwise the second call saves the sum of the first one,
        and the base values are lost.
        """
        for group in self._groups:
            with on(group.table.device):
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
            with on(group.table.device):
                _restore[group.grid](
                    group.table,
                    group.programs,
                    weight_type=TRITON_TYPES[group.weight_dtype],
                    slow_tile=TILE // group.fast_tile,
                    fast_tile=group.fast_tile,
                    num_warps=WARPS,
                    **OPTIONS,
                )


class _Group(NamedTuple):
    """The rows of a table that one launch handles: those of one dtype of weights and one dtype of blocks.

    Attributes:
        table: int64, ``(rows, 16)``, on the device.
        programs: int32, ``(programs, 2)``, on the device: for each program its row, and which part of the row it has.
        weight_dtype: dtype of the weights and of the saved values.
        blocks_dtype: dtype of the blocks.
        fast_tile: entries of a program's part along the fast dimension.
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
        # 64 entries of 16 bits are the 128 bytes that a warp loads at once. Where the blocks are narrower, a program
        # takes more rows instead.
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
    """Tensors of one shape, taken apart along their leading dimensions into tensors of three dimensions.

    Empty tensors give nothing.
    """
    if tensors[0].numel() == 0:
        return
    if tensors[0].dim() == 3:
        yield tensors
        return
    for parts in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
        yield from _unstacked(*parts)


def _described(weight: torch.Tensor, blocks: torch.Tensor, saved: torch.Tensor) -> list[int]:
    """A row of the table.

    Its last size and stride are those of the fast dimension: the one along which the weight's entries lie close
    together in memory.
    """
    tensors = [weight, blocks, saved]
    if _is_crosswise(weight):
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    flags = BLOCKS_CROSSWISE.value * _is_crosswise(tensors[1]) + SAVED_CROSSWISE.value * _is_crosswise(tensors[2])
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    return [*(tensor.data_ptr() for tensor in tensors), *tensors[0].shape, *strides, flags]


def _is_crosswise(blocks: torch.Tensor) -> bool:
    """Whether the entries of a ``(count, slow, fast)`` tensor lie closer together along its second dimension."""
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
    total = rounded(base.to(sum_type) + added.to(sum_type), weight_type)
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
    """The program's row of the table and its entries: indices along each dimension, and which of them are inside.

    A program goes through the blocks and their slow dimension as if these were one dimension, so that small blocks fill
    its entries too.
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
    """The program's entries of a tensor, ``(slow, fast)``.

    Triton puts neighbouring threads along the last dimension. So a tensor that lies crosswise is read as its transpose,
    and then turned.
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
    """int64 offsets of the program's entries along both dimensions."""
    down = block.to(tl.int64) * tl.load(strides) + inner.to(tl.int64) * tl.load(strides + 1)
    return down, fast.to(tl.int64) * tl.load(strides + 2)
