"""The diagonals of a layer's base weights while adapters are merged into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from diablo.layout import Layout
from diablo.ops.weight import set_diagonal, summed, write_to_diagonal

Added = Mapping[str, Mapping[Layout, Sequence[torch.Tensor]]]


class Diagonals:
    """Merges blocks into the diagonals of weights, and writes the base values back, to the bit.

    While blocks are merged into a weight, the base values of its diagonal are kept: 1/N of the weight for each layout.
    They are kept as tensors of their own, so that the weight can be moved, cast and copied meanwhile.
    """

    def __init__(self) -> None:
        self._pristine: dict[tuple[str, Layout], list[torch.Tensor]] = {}

    @torch.no_grad()
    def write(self, weights: Mapping[str, torch.Tensor], added: Added) -> None:
        """Make each diagonal the sum of the base values and blocks, whatever is merged into it now.

        Each sum is formed in fp32, or in the weight's dtype where that is wider, and rounded to the weight's dtype once
        for each layout. Where the layouts are those of the last call, and no weight has several, each diagonal is
        written only once.

        Args:
            weights: the weights by name, each ``(*stack, out_features, in_features)``.
            added: the blocks of the adapters, by the weight's name and by layout.
        """
        keys = [(name, layout) for name, by_layout in added.items() for layout in by_layout]
        if set(keys) != self._pristine.keys():
            self.restore(weights)
            self._pristine = {
                (name, layout): [tile.of_weight(weights[name]).clone() for tile in layout.tiles]
                for name, layout in keys
            }
        # Diagonals of different layouts overlap, so each layout adds to what the one before it has written.
        overlap = any(len(by_layout) > 1 for by_layout in added.values())
        if overlap:
            self._put_back(weights)
        for name, layout in keys:
            blocks = summed(added[name][layout])
            if overlap:
                write_to_diagonal(weights[name], blocks, layout)
            else:
                set_diagonal(weights[name], self._pristine[name, layout], blocks, layout)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Write the base values back, and drop the copies of them."""
        self._put_back(weights)
        self._pristine = {}

    def are_finite(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether every value on the diagonals that blocks are merged into is finite."""
        return all(
            bool(torch.isfinite(tile.of_weight(weights[name])).all())
            for name, layout in self._pristine
            for tile in layout.tiles
        )

    def _put_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        # Where diagonals of different layouts overlap, the copies of their base values are equal, so that the order
        # does not matter.
        for (name, layout), diagonal in self._pristine.items():
            for tile, values in zip(layout.tiles, diagonal, strict=True):
                tile.of_weight(weights[name]).copy_(values)
