"""The modules around adapted layers, each of which opens a pass when it is called outside of one."""

from __future__ import annotations

import copy
import inspect
from typing import Any
from weakref import ref

import torch
from torch import nn

from diablo.tuner.layer import DiabloLayer
from diablo.tuner.passes import left


class Opener:
    """The forward of a module, called in a pass of the adapted layers inside of it.

    It stands in the module as its attribute ``forward``, in the place of its class's. Hooks would not do: torch does
    not call them where Ctrl-C ends a forward. It keeps neither the module nor the layers alive.

    Args:
        module: the module.
        inner: the attribute ``forward`` that the module had; None where it was its class's.
    """

    def __init__(self, module: nn.Module, inner: Any = None) -> None:
        self._module, self._inner = ref(module), inner
        self._layers: list[ref[DiabloLayer]] | None = None
        self.__signature__ = inspect.signature(module.forward)
        self.__name__, self.__doc__ = "forward", module.forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, in a pass of its own where none runs, or one of adapters that are active no longer."""
        # A compiled graph has its passes inside of its operators.
        if torch.compiler.is_compiling() or not (layers := self.layers()):
            return self._forward(*args, **kwargs)
        passes = layers[0].passes
        current = passes.current()
        if current is None or current.changes != passes.changes:
            with left(passes.begin(layers, (args, kwargs))) as current:
                return self._marked(current, *args, **kwargs)
        if current.is_claimed:
            return self._forward(*args, **kwargs)
        return self._marked(current, *args, **kwargs)

    def layers(self) -> list[DiabloLayer]:
        """The adapted layers inside of the module; none after :meth:`close`."""
        if self._layers is None:
            module: Any = self._module()
            self._layers = [ref(inner) for inner in module.modules() if isinstance(inner, DiabloLayer)]
        return [layer for own in self._layers if (layer := own()) is not None]

    def close(self) -> None:
        """Open no more passes. Who has kept the forward, such as a hook of another library, may go on calling it."""
        self._layers = []
        module: Any = self._module()
        if vars(module).get("forward") is self:
            del module.forward
            if self._inner is not None:
                module.forward = self._inner

    def _marked(self, current: Any, *args: Any, **kwargs: Any) -> Any:
        current.is_claimed = True
        try:
            result = self._forward(*args, **kwargs)
            current.mark(result)
        finally:
            current.is_claimed = False
        return result

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        module: Any = self._module()
        return type(module).forward(module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Opener:
        # What holds this is the state of the module, whose copy is on its way.
        module: Any = self._module()
        return Opener(memo.get(id(module), module), copy.deepcopy(self._inner, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Opener, (self._module(), self._inner)


def connect(root: nn.Module) -> None:
    """Let all adapted layers of a model share their passes, and every module around them open one when it is called.

    Args:
        root: the model, in which the adapted layers are already.
    """
    layers = [inner for inner in root.modules() if isinstance(inner, DiabloLayer)]
    # Graphs of adapters that were there before have the passes of their layers.
    openers = [opener for module in root.modules() for opener in _openers_of(module)]
    known = next((layer for opener in openers for layer in opener.layers()), layers[0])
    for layer in layers:
        layer.passes = known.passes
    for opener in openers:
        opener.close()
    for module in root.modules():
        has_forward = type(module).forward is not nn.Module.forward and not isinstance(module, DiabloLayer)
        if has_forward and any(isinstance(inner, DiabloLayer) for inner in module.modules()):
            module.forward = Opener(module, vars(module).get("forward"))


def disconnect(root: nn.Module) -> None:
    """Give the modules of a model the forwards that they had before :func:`connect`."""
    for module in root.modules():
        for opener in _openers_of(module):
            opener.close()


def adapted_layers(root: nn.Module) -> list[DiabloLayer]:
    """The adapted layers inside of a module that :func:`connect` has seen; none of another one."""
    opener = next(iter(_openers_of(root)), None)
    return [] if opener is None else opener.layers()


def _openers_of(module: nn.Module) -> list[Opener]:
    # accelerate's hooks keep the forward that they have taken the place of, under another name.
    return [value for value in vars(module).values() if isinstance(value, Opener)]
