"""Adding blocks to the diagonals of many weights in one sweep, and putting the base values back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Protocol

import torch

from diablo.layout import Layout
from diablo.ops.backend import kernels_for
from diablo.ops.weight import summed

Diagonals = Mapping[Layout, Sequence[torch.Tensor]]
"""The blocks that are added to one weight, grouped by layout."""


class _Kernels(Protocol):
    def write(self) -> None: ...

    def restore(self) -> None: ...


class _Table(Protocol):
    saved: list[torch.Tensor]

    def write(self) -> None: ...

    def restore(self) -> None: ...


class DiagonalSweep:
    """Adds blocks to the diagonals of many weights, and restores the base values, for all weights together.

    A sweep reads and writes the diagonals alone, 1/N of the weights. On a GPU, one kernel does it for all weights. On a
    CPU, one call does it without coming back to Python between the weights. :meth:`write` copies the base values, and
    :meth:`restore` puts these copies back, to the bit. Addresses of tensors are looked up once, by the constructor:
    whoever moves a tensor needs a new sweep.

    Args:
        diagonals: pairs of a weight, ``(*stack, out_features, in_features)`` of any strides, and the blocks that are
            added to its diagonal, by layout. Blocks of equal layout are summed first, in fp32 or in the widest dtype
            among them if that is wider. Their sum and the base value are added in fp32, or in the widest of their
            dtypes if that is wider, and rounded to the weight's dtype once. Where a weight has blocks of several
            layouts, each layout adds to the values that the one before it has written.
        like: a sweep of the same weights, layouts and order, whose memory for base values this one uses, too. Then only
            one of them may be written at a time. A sweep of its own memory where None.

    Raises:
        RuntimeError: a CUDA graph is being recorded.
    """

    def __init__(self, diagonals: Sequence[tuple[torch.Tensor, Diagonals]], like: DiagonalSweep | None = None) -> None:
        # Diagonals of different layouts overlap, so they take turns: first the first layout of every weight, then the
        # second layout of every weight, and so on.
        turns = zip_longest(*([(weight, *item) for item in added.items()] for weight, added in diagonals))
        self._sums: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []
        # Tensors that are made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            parts = [part for turn in turns for part in self._parts_of(turn)]
            kept: Sequence[_Table | None] = [None] * len(parts) if like is None else like._tables
            self._tables: list[_Table] = [_table(*part, before) for part, before in zip(parts, kept, strict=True)]

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

    def _parts_of(
        self, turn: Sequence[tuple[torch.Tensor, Layout, Sequence[torch.Tensor]] | None]
    ) -> list[tuple[torch.device, list[torch.Tensor], list[torch.Tensor]]]:
        """For each device its weights and blocks, of which a table is made."""
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
        return [(device, *of_device) for device, of_device in views.items()]


def _table(
    device: torch.device, weights: list[torch.Tensor], blocks: list[torch.Tensor], like: _Table | None
) -> _Table:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph is being recorded, and the adapted model has not run since it was made or since a weight, a "
            "parameter or the choice of adapters changed: run one step before recording, as torch.cuda.graph asks for."
        )
    # `clone` keeps the order in which the weights' values lie in memory, so that both are read and written in order:
    # the sweep is limited by the bandwidth of the memory.
    saved = [weight.clone() for weight in weights] if like is None else like.saved
    kernels = kernels_for(device)
    if kernels is None:
        return _TorchTable(weights, blocks, saved)
    return _KernelTable(kernels.DiagonalTable(weights, blocks, saved), weights, saved)


class _TorchTable:
    """A table for torch's own functions over lists of tensors. The tensors of each row have one shape."""

    def __init__(self, weights: list[torch.Tensor], blocks: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
        self._weights, self._blocks, self.saved = weights, blocks, saved
        self._is_saved = False

    def write(self) -> None:
        torch._foreach_copy_(self.saved, self._weights)
        # From here on, and not before, an interruption (Ctrl-C) has to be followed by a restore.
        self._is_saved = True
        torch._foreach_add_(self._weights, self._blocks)

    def restore(self) -> None:
        if self._is_saved:
            torch._foreach_copy_(self._weights, self.saved)
            self._is_saved = False


class _KernelTable:
    """A table of addresses that one kernel works through."""

    def __init__(self, table: _Kernels, weights: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
        self._table, self._weights, self.saved = table, weights, saved
        self._is_saved = False

    def write(self) -> None:
        try:
            self._table.write()
        finally:
            # After an interrupted launch nobody knows whether the kernel ran, so a restore has to follow. If it did
            # not run, the saved values are those of the last write, or of the constructor.
            self._is_saved = True
        self._tell_autograd()

    def restore(self) -> None:
        if self._is_saved:
            self._table.restore()
            self._is_saved = False
            self._tell_autograd()

    def _tell_autograd(self) -> None:
        # The kernel writes to addresses, which autograd does not see. A graph that has saved one of the weights must
        # notice the change and raise an error.
        torch.autograd.graph.increment_version(self._weights)
