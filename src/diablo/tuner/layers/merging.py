"""The merging of adapters into the weights of a layer, and their updates as dense tensors."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn

from diablo.layout import Layout
from diablo.ops.weight import write_to_diagonal
from diablo.tuner.layers.diagonal import Diagonals
from diablo.tuner.layers.offloading import offloading_hook
from diablo.tuner.weights import Weight, is_distributed, recomputed


class MergingLayer(nn.Module, BaseTunerLayer):
    """A layer whose adapters can be merged into its weights, and taken out again to the bit.

    Attributes:
        base_layer: the module that is adapted.
        weights: how each adapted weight of it is read, by the weight's name in the module.
        diablo_blocks: the parameters by the adapter's name, each ``(*stack, N, d_in, d_out)`` as its layout says.
        diablo_layout: the geometry, by the adapter's name.
        merged_adapters: names of the merged adapters.
        diagonals: the base values of the diagonals that adapters are merged into.
    """

    base_layer: nn.Module
    weights: dict[str, Weight]
    diablo_blocks: Any
    diablo_layout: dict[str, Any]
    merged_adapters: list[str]
    diagonals: Diagonals

    @abstractmethod
    def _check_base(self) -> None:
        """Refuse to read a weight as the base weight, or to change it, while blocks of a pass stand in it."""

    def blocks_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """An adapter's blocks by the name of the weight that they belong to; empty if it is not on this layer."""
        return {"weight": self.diablo_blocks[adapter_name]} if adapter_name in self.diablo_blocks else {}

    def layouts_of(self, adapter_name: str) -> dict[str, Layout]:
        """An adapter's layouts by the name of the weight that they belong to; empty if it is not on this layer."""
        return {"weight": self.diablo_layout[adapter_name]} if adapter_name in self.diablo_layout else {}

    def added(self, names: Sequence[str]) -> dict[str, dict[Layout, list[torch.Tensor]]]:
        """What adapters add to the diagonals of the weights: their blocks, by the weight's name and by layout."""
        added: dict[str, dict[Layout, list[torch.Tensor]]] = {}
        for adapter_name in names:
            layouts = self.layouts_of(adapter_name)
            for name, blocks in self._values_of(adapter_name).items():
                added.setdefault(name, {}).setdefault(layouts[name], []).append(blocks)
        return added

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add blocks to the base weight's diagonal. Only 1/N of the weight is touched.

        The sum starts from the base values. It is formed in fp32, or in the weight's dtype where that is wider, and
        rounded to the weight's dtype once for each layout. Adapters of equal layouts are summed before they are added.

        Args:
            safe_merge: whether blocks that would put a NaN or an infinity into the weight are refused, and the weight
                is left untouched.
            adapter_names: adapters to merge; the active ones if None.

        Raises:
            ValueError: ``safe_merge`` found a value that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.diablo_blocks]
        if not names:
            return
        already_merged = self.merged_adapters
        try:
            self._write(already_merged + names, safe_merge)
        except ValueError:
            if already_merged:
                self._write(already_merged, safe_merge=False)
            raise

    def unmerge(self) -> None:
        """Put the base weight back as it was before any merge, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()

    def merge_instead(self, adapter_names: Sequence[str]) -> None:
        """Make the weight, to the bit, what it is with these adapters merged and no others. It is written once."""
        names = [name for name in adapter_names if name in self.diablo_blocks]
        if names:
            self._write(names, safe_merge=False)
        elif self.merged:
            self._restore()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's update as a dense tensor of the base weight's shape, in the dtype of the blocks.

        Merging does not need it. It is for conversion and inspection.

        Raises:
            ValueError: the layer has no adapter of that name, or has several weights.
        """
        if adapter_name not in self.diablo_blocks:
            raise ValueError(f"This layer has no adapter {adapter_name!r}; it has {', '.join(self.diablo_blocks)}.")
        if self.weights.keys() != {"weight"}:
            raise ValueError(f"This layer has the weights {', '.join(self.weights)}: call delta_weights().")
        return self.delta_weights(adapter_name)["weight"]

    def delta_weights(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The adapter's updates as dense tensors of the weights' shapes, by the name of the weight."""
        deltas = {}
        layouts = self.layouts_of(adapter_name)
        for name, blocks in self._values_of(adapter_name).items():
            # The weight's own shape is of no use here. A quantized weight has another shape, and asking for that of a
            # computed weight would compute it.
            sizes = *self.weights[name].stack, layouts[name].out_features, layouts[name].in_features
            delta = torch.zeros(sizes, dtype=blocks.dtype, device=blocks.device)
            write_to_diagonal(delta, blocks.detach(), layouts[name])
            deltas[name] = self.weights[name].original(delta)
        return deltas

    def _weight(self, name: str) -> torch.Tensor:
        """A base weight as ``(*stack, out_features, in_features)``: a view, to read it and to write to it."""
        base_layer: Any = self.get_base_layer()
        if (how := recomputed(base_layer, name)) is not None:
            raise RuntimeError(
                f"{how.by} computes the {name} of this {type(base_layer).__name__} anew in each forward, so that "
                f"merged blocks would be lost: use the adapter unmerged, or call {how.undo} first."
            )
        # When a computed weight is made plain again, torch leaves a buffer where the weight is frozen.
        parameter = base_layer._parameters.get(name, base_layer._buffers.get(name))
        return self.weights[name].matrix(self._stored(parameter))

    def _stored(self, parameter: torch.Tensor) -> torch.Tensor:
        """The tensor in this process's memory that holds a parameter's values."""
        if is_distributed(parameter):
            raise RuntimeError(
                "The weight of an adapted layer is sharded, so that blocks cannot be merged into it or taken out: do "
                "that before fully_shard, or save the adapter and merge it into the whole model."
            )
        # Unlike `data`, this tells autograd what is written. A graph that needs the old values then raises an error.
        return parameter.detach()

    def _matrices(self) -> dict[str, torch.Tensor]:
        """The weights, to merge into them or restore them."""
        self._check_base()
        return {name: self._weight(name) for name in self.weights}

    @torch.no_grad()
    def _write(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Merge adapters into the base weights."""
        with self._weights_at_hand():
            weights = self._matrices()
            self.diagonals.write(weights, self.added(adapter_names))
            self.merged_adapters = list(adapter_names)
            finite = not safe_merge or self._are_finite(weights)
            if not finite:
                self._restore()
        if not finite:
            raise self._not_finite(adapter_names)

    def _are_finite(self, weights: Mapping[str, torch.Tensor]) -> bool:
        return self.diagonals.are_finite(weights)

    def _values_of(self, adapter_name: str) -> Mapping[str, torch.Tensor]:
        """An adapter's blocks in this process's memory, by the name of the weight."""
        return self.blocks_of(adapter_name)

    def _not_finite(self, adapter_names: list[str]) -> ValueError:
        return ValueError(
            f"Merging {', '.join(adapter_names)} would put NaN or infinite values into the weight, "
            "which is left untouched: the adapter is broken, or its blocks overflow the weight's dtype."
        )

    def _restore(self) -> None:
        with self._weights_at_hand():
            self.diagonals.restore(self._matrices())
        self.merged_adapters = []

    def _weights_at_hand(self) -> AbstractContextManager[Any]:
        """A context for changing the weights. Offloaded ones are fetched, and accelerate keeps their new values."""
        base_layer = self.get_base_layer()
        is_away = any(own is not None and own.is_meta for own in base_layer._parameters.values())
        return onload_layer(self) if is_away and offloading_hook(base_layer) else nullcontext()
