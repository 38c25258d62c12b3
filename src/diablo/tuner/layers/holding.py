"""Layers that can have their blocks in their weights while a pass runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.layers.in_place import hooks_of
from diablo.tuner.layers.offloading import offloading_hook
from diablo.tuner.plans import LAYERS, Member, Watched
from diablo.tuner.weights import Weight

# For each weight the numbers of the layers that have found that they can write blocks into it. No weight is kept alive.
_HOLDERS: Any = WeakIdKeyDictionary()


class HoldingLayer(DiabloLayer):
    """A layer that, where possible, has the blocks of its active adapters in its weights while a pass runs.

    Adapters that are not trained stand beside the weights: several threads can then use the weights at once.

    Args:
        base_layer: the module to adapt, frozen by PEFT.
        weights: how each of its adapted weights is read, by the weight's name in the module.
    """

    def __init__(self, base_layer: nn.Module, weights: Mapping[str, Weight]) -> None:
        super().__init__(base_layer, weights)
        self._can_hold = False
        # The weights as `settle` found them. Wrappers that shard or tie weights replace them later.
        self._seen: dict[str, ReferenceType[torch.Tensor]] = {}

    @abstractmethod
    def obstacle(self) -> str | None:
        """Why the blocks have to stand beside the weights in their present state; None where they can be in them.

        This does not check whether other modules share a weight.
        """

    def settle(self, is_shared: bool) -> None:
        """Find out whether blocks can be written into the weights in their present state.

        Args:
            is_shared: whether another module of the model shares one of the weights.
        """
        self._can_hold = not is_shared and self.obstacle() is None
        self._seen = {}
        if self._can_hold:
            for name in self.weights:
                weight: Any = self.base_layer._parameters[name]
                self._seen[name] = ref(weight)
                _HOLDERS.setdefault(weight, set()).add(self.number)
                for other in self._others(weight):
                    other.passes.forget()

    def _others(self, weight: torch.Tensor) -> list[Member]:
        """Layers of other adapted models that can write blocks into the same weight."""
        layers = (LAYERS.get(number) for number in _HOLDERS.get(weight, ()))
        return [layer for layer in layers if layer is not None and layer.passes is not self.passes]

    def part(self, names: tuple[str, ...]) -> tuple[Any, bool]:
        """Prepare the layer for a pass with these adapters.

        Returns:
            Its part: the object with which the layer computes in the pass, or None where it calls its base layer. And
            whether the blocks stand in its weights during the pass.

        Raises:
            RuntimeError: ``in_place=True`` demands that the blocks stand in the weights, and they cannot.
        """
        obstacle = self._obstacle_now()
        holds = self._holds(names, obstacle)
        return self._part(names, not holds) if obstacle is None else None, holds

    @abstractmethod
    def _part(self, names: tuple[str, ...], is_beside: bool) -> Any:
        """The layer's part in a pass, where it reads the weights itself; None where it calls its base layer."""

    def _holds(self, names: tuple[str, ...], obstacle: str | None) -> bool:
        names = self._not_merged(names)
        if not all(self.diablo_in_place[name] for name in names):
            return False
        if names and not self._is_trained(names):
            return False
        if obstacle is not None and any(self.diablo_in_place[name] is True for name in names):
            sizes = ", ".join(f"{name} of {w.in_features} -> {w.out_features}" for name, w in self.weights.items())
            raise RuntimeError(
                f"in_place=True has become impossible for this {type(self.base_layer).__name__} ({sizes}) since the "
                f"adapter was added: {obstacle}. Set in_place='auto'."
            )
        return obstacle is None

    def _is_trained(self, names: tuple[str, ...]) -> bool:
        return any(blocks.requires_grad for name in names for blocks in self.blocks_of(name).values())

    def _obstacle_now(self) -> str | None:
        if reason := self.obstacle() or self._merged_obstacle():
            return reason
        parameters = self.base_layer._parameters
        if not self._can_hold or any(
            (weight := parameters.get(name)) is not seen() or weight.requires_grad  # pyrefly: ignore[missing-attribute]
            for name, seen in self._seen.items()
        ):
            return "its weight was trained, tied, sharded or replaced"
        seen = (own() for own in self._seen.values())
        if any(self._others(weight) for weight in seen if weight is not None):
            return "another adapted model has its weight too"
        return None

    def _merged_obstacle(self) -> str | None:
        # A merge and a pass in one weight would each take the other's blocks for base values.
        if not self.merged_adapters:
            return None
        return f"{', '.join(self.merged_adapters)} is merged into the weight until unmerge_adapter() is called"

    def watched(self, names: tuple[str, ...]) -> Watched:
        """What the layer's part in a pass with these adapters depends on, besides the choice of adapters."""
        parameters = self.base_layer._parameters
        # Weights that accelerate offloads are other tensors in every forward, so they are not watched. Whether they are
        # offloaded is watched: accelerate puts a `forward` among the attributes of the base layer.
        is_offloaded = offloading_hook(self.base_layer) is not None
        own = [(parameters, name) for name in (*self.weights, "bias") if name in parameters and not is_offloaded]
        modules: dict[str, Any] = self._modules
        dropout = [(self.diablo_dropout._modules, name) for name in names]
        places = [(modules, "base_layer"), *own, *self._block_tables(names), *dropout]
        return Watched(places, self._hooks(), [vars(self.base_layer)])

    def _hooks(self) -> list[Mapping[int, Any]]:
        """The hooks of the base layer. They are not called where the layer reads the weights itself."""
        return hooks_of(self.base_layer)

    def _let_go(self) -> None:
        """Drop all references to the weights: torch does not move a DTensor to which there is even a weak reference."""
        for seen in self._seen.values():
            if (weight := seen()) is not None:
                _HOLDERS[weight].discard(self.number)
                if not _HOLDERS[weight]:
                    del _HOLDERS[weight]
        self._seen = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._let_go()
        super()._apply(fn, recurse)
        self.settle(not self._can_hold)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled.
        return super().__getstate__() | {"_seen": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle(not self._can_hold)
