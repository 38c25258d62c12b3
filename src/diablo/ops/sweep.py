"""Writing blocks onto the diagonals of many weights in one sweep, and taking them off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Protocol

import torch

from diablo.layout import Layout
from diablo.ops.backend import kernels_for
from diablo.ops.weight import summed

Diagonals = Mapping[Layout, Sequence[torch.Tensor]]
"""The blocks that are added to one weight: the parameters of equal layout together."""


class _Table(Protocol):
    def write(self) -> None: ...

    def restore(self) -> None: ...


class DiagonalSweep:
    """The diagonals of many weights, written with blocks and restored together.

    A sweep reads and writes the diagonals alone, 1/N of the weights. On a GPU it is one kernel for all of them, and on
    a CPU one call that does not come back to Python between the weights. The base values are copied when the blocks
    are written, so that what :meth:`restore` puts back is what stood there, to the bit. Addresses are looked up once:
    a sweep is made anew where a tensor has moved.

    Args:
        diagonals: pairs of a weight, ``(*stack, out_features, in_features)`` of any strides, and what is added to its
            diagonal. Blocks of equal layout are summed first, in fp32 or the widest dtype among them; the sum with the
            base value is formed in fp32, or in the wider dtype of the two, and rounded to the weight's dtype once.
            Where layouts differ, each starts from what the one before it has written.
    """

    def __init__(self, diagonals: Sequence[tuple[torch.Tensor, Diagonals]]) -> None:
        # Diagonals of different layouts overlap, so that they take turns: the first of every weight, then the second.
        turns = zip_longest(*([(weight, *item) for item in added.items()] for weight, added in diagonals))
        self._sums: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []
        # A buffer that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._tables = [table for turn in turns for table in self._tables_of(turn)]

    def write(self) -> None:
        """Copy the base values, and add the blocks as they are now."""
        for total, blocks in self._sums:
            summed(blocks, out=total)
        for table in self._tables:
            table.write()

    def restore(self) -> None:
        """Put the base values back, to the bit."""
        for table in reversed(self._tables):
            table.restore()

    def _tables_of(self, turn: Sequence[tuple[torch.Tensor, Layout, Sequence[torch.Tensor]] | None]) -> list[_Table]:
        """One table for each device."""
        views: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for weight, layout, blocks in filter(None, turn):
            values = [own.detach() for own in blocks]
            total = summed(values)
            if len(values) > 1:
                self._sums.append((total, values))
            weights, added = views.setdefault(weight.device, ([], []))
            for tile in layout.tiles:
                weights.append(tile.of_weight(weight.detach()))
                added.append(tile.of_blocks(total))
        return [_table(device, *of_device) for device, of_device in views.items()]


def _table(device: torch.device, weights: list[torch.Tensor], blocks: list[torch.Tensor]) -> _Table:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph is being recorded in the first step of an adapted model, or the first one after a weight, a "
            "parameter or the choice of adapters has changed: run a step before, as torch.cuda.graph asks for."
        )
    # Copies in the order of the weights' memory: the sweep is limited by its bandwidth.
    saved = [weight.clone() for weight in weights]
    kernels = kernels_for(device)
    if kernels is None:
        return _TorchTable(weights, blocks, saved)
    return _KernelTable(kernels.DiagonalTable(weights, blocks, saved), weights)


class _TorchTable:
    """Views of equal shape, in torch's own functions over lists of tensors."""

    def __init__(self, weights: list[torch.Tensor], blocks: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
        self._weights, self._blocks, self._saved = weights, blocks, saved
        self._is_saved = False

    def write(self) -> None:
        torch._foreach_copy_(self._saved, self._weights)
        # From here on, and not before, an interruption has to be followed by a restore.
        self._is_saved = True
        torch._foreach_add_(self._weights, self._blocks)

    def restore(self) -> None:
        if self._is_saved:
            torch._foreach_copy_(self._weights, self._saved)
            self._is_saved = False


class _KernelTable:
    """A table of addresses, which one kernel goes through."""

    def __init__(self, table: _Table, weights: list[torch.Tensor]) -> None:
        self._table, self._weights = table, weights
        self._is_saved = False

    def write(self) -> None:
        try:
            self._table.write()
        finally:
            # Where the launch was interrupted, nobody knows whether it came to pass: the values before are then those
            # of the last write.
            self._is_saved = True
        self._tell_autograd()

    def restore(self) -> None:
        if self._is_saved:
            self._table.restore()
            self._is_saved = False
            self._tell_autograd()

    def _tell_autograd(self) -> None:
        # A kernel writes to addresses. A graph that has kept one of the weights must notice, and raise an error.
        torch.autograd.graph.increment_version(self._weights)
