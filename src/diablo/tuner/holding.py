"""Layers whose blocks can stand in their weights while they are trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from diablo.tuner.layer import DiabloLayer
from diablo.tuner.weights import Weight


class HoldingLayer(DiabloLayer):
    """A layer that writes the blocks of its active adapters into its weights while they are trained, where it can.

    Every forward writes them anew: nothing tells reliably whether an optimizer has changed them. The backward writes
    them again where something else has been written in between.

    Args:
        base_layer: the module to adapt, frozen by PEFT.
        weights: how each adapted weight of it is read, by the weight's name in the module.
    """

    def __init__(self, base_layer: nn.Module, weights: Mapping[str, Weight]) -> None:
        super().__init__(base_layer, weights)
        self._can_hold = False
        # The weights when they were looked at, and where they were: wrappers that shard or replace them make others,
        # which may well lie where these were. Not held here, so that they can go.
        self._homes: dict[str, tuple[ReferenceType[torch.Tensor], int]] = {}

    @abstractmethod
    def obstacle(self) -> str | None:
        """Why the blocks have to stand beside the weights as these are now; None where they can be written into them.

        Whether other modules share a weight is not looked at.
        """

    def settle(self, is_shared: bool) -> None:
        """Find out whether blocks can be written into the weights as they are now.

        Args:
            is_shared: whether another module of the model has one of them too.
        """
        self._can_hold = not is_shared and self.obstacle() is None
        self._homes = {}
        if self._can_hold:
            for name in self.weights:
                weight = self.base_layer._parameters[name]
                assert weight is not None
                self._homes[name] = ref(weight), self._stored(weight).data_ptr()

    @staticmethod
    def _is_plain(weight: Any) -> bool:
        """Whether a weight is of the kind that blocks can be written into."""
        return type(weight) is nn.Parameter

    def _names_in_weight(self) -> tuple[str, ...] | None:
        """The adapters whose blocks this forward has in the weights; None where they stand beside them."""
        names: tuple[str, ...] = ()
        if not self.disable_adapters:
            names = tuple(name for name in self.active_adapters if name in self.diablo_blocks)
        # An adapter that is not trained stands beside: then the weight can be shared by threads.
        if names and not any(blocks.requires_grad for name in names for blocks in self.blocks_of(name).values()):
            return None
        if not all(self.diablo_in_place[name] for name in names):
            return None
        if self._fits_now():
            return names
        if any(self.diablo_in_place[name] is True for name in names):
            raise self._impossible("Set in_place='auto'")
        return None

    def _fits_now(self) -> bool:
        """Whether the weights are those that :meth:`settle` has seen, and frozen."""
        if not self._can_hold:
            return False
        for name, (seen, home) in self._homes.items():
            weight = self.base_layer._parameters.get(name)
            if weight is None or weight.requires_grad:
                return False
            # The compiler cannot trace where a tensor lies.
            if torch.compiler.is_compiling():
                continue
            if weight is not seen() or self._stored(weight).data_ptr() != home:
                return False
        return True

    def _impossible(self, advice: str) -> RuntimeError:
        reason = self.obstacle() or "its weight was trained, tied, sharded or replaced"
        sizes = ", ".join(f"{name} of {w.in_features} -> {w.out_features}" for name, w in self.weights.items())
        return RuntimeError(
            f"in_place=True has become impossible for this {type(self.base_layer).__name__} ({sizes}) since the "
            f"adapter was added: {reason}. {advice}."
        )

    def _hold(self, names: tuple[str, ...], anew: bool) -> None:
        """Write blocks into the weights.

        Args:
            names: the adapters whose blocks they are; none for the weights as they were.
            anew: also where they stand there already.
        """
        if not anew and self.diagonals.held == names:
            return
        if self.merged:
            raise RuntimeError(
                f"{', '.join(self.merged_adapters)} was merged between a forward and its backward, which needs the "
                "weight as it was: call backward() before merge_adapter()."
            )
        weights = self._matrices()
        if any(weight.is_cuda for weight in weights.values()) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph is being recorded, which would replay the writing of blocks into the weight without the "
                "bookkeeping of what stands there: set in_place=False, or train without the graph."
            )
        self.diagonals.write(weights, names, self._summed(self._blocks(names)))

    def train(self, mode: bool = True) -> HoldingLayer:
        """Set training mode; weights that a wrapper has sharded meanwhile are written into no longer."""
        if any(not self._is_plain(self.base_layer._parameters.get(name)) for name in self._homes):
            self._can_hold = False
        super().train(mode)
        return self

    def _restore(self) -> None:
        # After a shard was made of the weight with blocks in it, nothing can take them out of there.
        if any(self.base_layer._parameters.get(name) is not seen() for name, (seen, _) in self._homes.items()):
            raise RuntimeError(
                f"The weight of a {type(self.base_layer).__name__} was sharded or replaced while the blocks of "
                f"{', '.join(self.diagonals.held)} stood in it: take them out before, by unmerge_adapter() where they "
                "are merged, and else by entering model.disable_adapter() once."
            )
        super()._restore()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.leave_weight()
        # torch does not move a DTensor that is referred to from elsewhere.
        self._homes = {}
        super()._apply(fn, recurse)
        self.settle(not self._can_hold)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # References that are not held cannot be pickled.
        return self.__dict__ | {"_homes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy, or what was pickled, has weights elsewhere.
        self.settle(not self._can_hold)
