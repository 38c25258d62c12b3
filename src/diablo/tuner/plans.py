"""The plan of a pass: which adapters each layer uses in it, and what stands in the weights meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from operator import attrgetter, getitem, is_, methodcaller
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from diablo.layout import Layout
from diablo.ops.sweep import DiagonalSweep


class Watched(NamedTuple):
    """Everything that a layer's part in a pass depends on. Each pass checks whether it is still as it was.

    Attributes:
        places: where torch keeps tensors and modules: pairs of a table and a key. The same object must be found there.
        hooks: tables of hooks. What matters is whether each is empty.
        namespaces: attributes of modules. What matters is whether each has an entry ``forward``.
    """

    places: Sequence[tuple[dict[str, Any], str]] = ()
    hooks: Sequence[Mapping[int, Any]] = ()
    namespaces: Sequence[dict[str, Any]] = ()


class Member(Protocol):
    """What a pass needs of a layer; :class:`diablo.tuner.layers.DiabloLayer` implements it.

    Attributes:
        number: the layer's number in ``LAYERS``.
        merged_adapters: names of the adapters that are merged into the layer's weights.
        passes: the :class:`diablo.tuner.passes.Passes` of the model that the layer belongs to.
    """

    number: int
    merged_adapters: list[str]
    passes: Any

    @property
    def disable_adapters(self) -> bool:
        """Whether all adapters are switched off."""

    @property
    def active_adapters(self) -> Sequence[str]:
        """Names of the active adapters. Some of them may not be on this layer."""

    def names_in_use(self) -> tuple[str, ...]:
        """The adapters of this layer that a pass would use now."""

    def part(self, names: tuple[str, ...]) -> tuple[Any, bool]:
        """Prepare the layer for a pass with these adapters.

        Returns:
            Its part: the object with which the layer computes in the pass, or None where it needs none. And whether the
            blocks stand in its weights during the pass.
        """

    def diagonals_of(self, names: Sequence[str]) -> list[tuple[torch.Tensor, dict[Layout, list[torch.Tensor]]]]:
        """The weights that a pass writes these adapters' blocks into, each with its blocks by layout."""

    def watched(self, names: tuple[str, ...]) -> Watched:
        """What the layer's part in a pass with these adapters depends on, besides the choice of adapters."""

    def take_blocks_back(self) -> None:
        """Bring the blocks back to their device, where accelerate has offloaded them."""


LAYERS: WeakValueDictionary[int, Member] = WeakValueDictionary()
"""The adapted layers by number. Plans and operators use it: they must not keep layers alive, and graphs keep plans."""

_CHOICE = attrgetter("_active_adapter", "_disable_adapters", "merged_adapters")
_ADDRESS = torch.Tensor.data_ptr
_REQUIRES_GRAD = attrgetter("requires_grad")
_HAS_FORWARD = methodcaller("__contains__", "forward")


class Plan:
    """What a pass uses and writes: the adapters of each layer, and the blocks that stand in the weights meanwhile.

    Args:
        layers: the layers of the pass.
        names: the adapters that each layer uses, by the layer's number.
        bare: whether the weights are left alone. The blocks are then beside the weights on all layers.

    Attributes:
        names: as given.
        parts: the parts of the layers that have one (see :meth:`Member.part`), by the layer's number.
        held: the numbers of the layers whose blocks stand in their weights.
        writes: whether any blocks are written into weights.
        sweep: writes the blocks, and restores the base values.
        active: the adapters that were active when the plan was made; None where all were disabled.
    """

    def __init__(self, layers: Sequence[Member], names: Mapping[int, tuple[str, ...]], bare: bool) -> None:
        self.names = names
        self.active = None if layers[0].disable_adapters else tuple(layers[0].active_adapters)
        self.parts: dict[int, Any] = {}
        self.held: set[int] = set()
        diagonals = []
        for layer in () if bare else layers:
            part, holds = layer.part(names[layer.number])
            if part is not None:
                self.parts[layer.number] = part
            if holds:
                self.held.add(layer.number)
                diagonals += layer.diagonals_of(names[layer.number])
        self.writes = bool(diagonals)
        self.sweep = DiagonalSweep(diagonals)
        # What the plan depends on stands in flat lists: comparing these runs no Python code for each layer.
        watched = [layer.watched(names[layer.number]) for layer in layers]
        self._choices = copy.deepcopy([_CHOICE(layer) for layer in layers])
        self._tables = [table for own in watched for table, _ in own.places]
        self._keys = [key for own in watched for _, key in own.places]
        self._found = list(map(getitem, self._tables, self._keys))
        self._parameters = [found for found in self._found if type(found) is torch.nn.Parameter]
        self._addresses = list(map(_ADDRESS, self._parameters))
        self._trained = list(map(_REQUIRES_GRAD, self._parameters))
        self._hooks = [hooks for own in watched for hooks in own.hooks]
        self._hooked = list(map(bool, self._hooks))
        self._namespaces = [namespace for own in watched for namespace in own.namespaces]
        self._overridden = list(map(_HAS_FORWARD, self._namespaces))
        # A module can change its class and stay the same object. A tensor of another class is another object, so that
        # only the classes of modules are compared.
        self._modules = [found for found in self._found if isinstance(found, torch.nn.Module)]
        self._types = list(map(type, self._modules))

    def is_there(self) -> bool:
        """Whether the weights, blocks and modules are the same objects, and the parameters' memory is where it was."""
        try:
            if not all(map(is_, map(getitem, self._tables, self._keys), self._found)):
                return False
        except KeyError:
            return False
        return list(map(_ADDRESS, self._parameters)) == self._addresses

    def is_chosen(self, layers: Sequence[Member]) -> bool:
        """Whether the choice of adapters, what is trained, and how the base layers compute are as they were."""
        return (
            list(map(_CHOICE, layers)) == self._choices
            and list(map(_REQUIRES_GRAD, self._parameters)) == self._trained
            and list(map(bool, self._hooks)) == self._hooked
            and list(map(_HAS_FORWARD, self._namespaces)) == self._overridden
            and list(map(type, self._modules)) == self._types
        )

    def covers(self, layers: Sequence[Member]) -> bool:
        """Whether all these layers are in the plan."""
        return all(layer.number in self.names for layer in layers)

    def check_unmerged(self) -> None:
        """Refuse to write blocks into a weight that adapters have been merged into after the plan was made.

        Raises:
            RuntimeError: a weight has merged adapters.
        """
        for number in self.held:
            if (layer := LAYERS.get(number)) is not None and layer.merged_adapters:
                raise RuntimeError(
                    f"{', '.join(layer.merged_adapters)} was merged between a forward and its backward, which needs "
                    "the weight as it was: call backward() before merge_adapter()."
                )
