"""Blocks beside the weights: each row of a batch is multiplied by the blocks of its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diablo.ops.rows import add_row_products
from diablo.serving.weights import Blocks, Weights
from diablo.tuner.layers.in_place import module_obstacle
from diablo.tuner.targets import Target


class Beside:
    """The blocks of each row of a batch, which are added to what the base weights give.

    Each place of a batch has room for the blocks of one adapter. They are copied there when a row of another adapter
    takes the place. There are as many places as rows have stood together, so that the memory is that of the blocks
    times the rows of the largest batch.

    Args:
        weights: the model's weights. The base values have to be in them while rows are forwarded.
        targets: what the adapters adapt, all of them alike.
        most: the most rows that will stand together.
    """

    def __init__(self, weights: Weights, targets: tuple[Target, ...], most: int) -> None:
        self.targets = targets
        self._most = most
        self._like = [weights.weight(target).detach() for target in targets]
        self._hooked = [weights.model.get_submodule(target.module) for target in targets]
        # For each place the adapter whose blocks are there, and for each target and tile the blocks of all places.
        self._held: list[Hashable] = []
        self._places: list[list[torch.Tensor]] = []
        self._now: slice | None = None

    @contextmanager
    def attached(self) -> Generator[None]:
        """Have the model's modules look here meanwhile."""
        hooks = [
            module.register_forward_hook(self._hook(index, target))
            for index, (module, target) in enumerate(zip(self._hooked, self.targets, strict=True))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def rows(self, first: int, rows: Sequence[tuple[Hashable, Blocks]]) -> Generator[None]:
        """Have a forward add each row's blocks.

        Args:
            first: the place of the forward's first row in the batch.
            rows: for each row of the forward what tells its adapter from others, and the values of that.
        """
        self._make_room(first + len(rows))
        for place, (adapter, blocks) in enumerate(rows, start=first):
            self._hold(place, adapter, blocks)
        self._now = slice(first, first + len(rows))
        try:
            yield
        finally:
            self._now = None

    def _hook(self, index: int, target: Target) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def add(_: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self._now is not None:
                own = [blocks[self._now] for blocks in self._places[index]]
                add_row_products(output, given[0], target.layout.tiles, own)

        return add

    def _make_room(self, size: int) -> None:
        before = len(self._held)
        if size <= before:
            return
        # Twice as much each time, so that a batch that grows row by row is copied a few times only.
        size = max(size, min(2 * before, self._most))
        for index, (target, like) in enumerate(zip(self.targets, self._like, strict=True)):
            grown = [like.new_zeros(size, tile.count, tile.block_in, tile.block_out) for tile in target.layout.tiles]
            if before:
                for new, old in zip(grown, self._places[index], strict=True):
                    new[:before] = old[:before]
            self._places[index : index + 1] = [grown]
        self._held += [None] * (size - before)

    def _hold(self, place: int, adapter: Hashable, blocks: Blocks) -> None:
        if self._held[place] is adapter:
            return
        self._held[place] = None
        for target, own, values in zip(self.targets, self._places, blocks.tensors, strict=True):
            for tile, part in zip(target.layout.tiles, own, strict=True):
                part[place].copy_(tile.of_blocks(values), non_blocking=True)
        self._held[place] = adapter


@torch.no_grad()
def can_stand_beside(weights: Weights, targets: tuple[Target, ...]) -> bool:
    """Whether the blocks of targets can be added row by row: each is a linear layer that sees rows as rows.

    Some models hand the tokens of all rows to a layer in one dimension, as mixtures of experts do. A small forward
    tells.
    """
    modules = [weights.model.get_submodule(target.module) for target in targets]
    if any(target.parameter is not None for target in targets) or any(map(module_obstacle, modules)):
        return False
    shape = (2, 3)
    seen: dict[Any, bool] = {}

    def look(module: Any, given: tuple[Any, ...], output: Any) -> None:
        fits = bool(given) and given[0].dim() == 3 and given[0].shape[:2] == output.shape[:2] == shape
        seen[module] = seen.get(module, True) and fits and output.is_contiguous() and output.dtype is given[0].dtype

    hooks = [module.register_forward_hook(look) for module in modules]
    try:
        weights.model(torch.zeros(shape, dtype=torch.long, device=weights.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return len(seen) == len(modules) and all(seen.values())
