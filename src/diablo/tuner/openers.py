"""The modules around adapted layers, each of which opens a pass when it is called outside of one."""

from __future__ import annotations

import copyreg
from functools import wraps
from types import new_class
from typing import Any
from weakref import ref

import torch
from torch import nn

from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.passes import left


def connect(root: nn.Module) -> None:
    """Let all adapted layers of a model share their passes, and every module around them open one when it is called.

    Such a module becomes an instance of a subclass of its class, under the same name: its forward is that of its class,
    in a pass. Hooks would not do: torch does not call them where Ctrl-C ends a forward. Nor would a forward among its
    attributes: the compiler would compile each layer of a model anew where they are compiled one by one.

    Args:
        root: the model, in which the adapted layers are already.
    """
    layers = _layers_in(root)
    # Graphs of adapters that were there before have the passes of their layers.
    known = next((layer for module in root.modules() for layer in adapted_layers(module)), layers[0])
    for layer in layers:
        layer.passes = known.passes
    modules = [module for module in root.modules() if not isinstance(module, DiabloLayer)]
    around = [module for module in modules if _layers_in(module)]
    # Who looks for the modules of a class, as wrappers do that shard layers, must find all of them or none.
    others = set(modules) - set(around)
    partly = {_plain(type(module)) for module in others}
    for module in around:
        plain = _plain(type(module))
        if plain not in partly and (opening := _opening(plain)) is not None:
            module.__class__ = opening
            vars(module)["_diablo_inside"] = _Inside()


def disconnect(root: nn.Module) -> None:
    """Make the modules of a model what they were before :func:`connect`."""
    for module in root.modules():
        vars(module).pop("_diablo_inside", None)
        module.__class__ = _plain(type(module))


# The compiler takes a reference that is not held for what it refers to.
@torch.compiler.disable
def adapted_layers(module: nn.Module) -> list[DiabloLayer]:
    """The adapted layers inside of a module that opens passes; none of another one."""
    inside: _Inside | None = vars(module).get("_diablo_inside")
    return [] if inside is None else inside.layers(module)


class _Inside:
    """The adapted layers inside of a module, which it does not keep alive; a copy of the module has others."""

    def __init__(self) -> None:
        self._layers: list[ref[DiabloLayer]] | None = None

    def layers(self, module: nn.Module) -> list[DiabloLayer]:
        if self._layers is None:
            self._layers = [ref(layer) for layer in _layers_in(module)]
        return [layer for own in self._layers if (layer := own()) is not None]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Inside, ()


def _layers_in(module: nn.Module) -> list[DiabloLayer]:
    return [inner for inner in module.modules() if isinstance(inner, DiabloLayer)]


def _plain(cls: type) -> type:
    """The class that an opening one was made of, or the class itself."""
    return vars(cls).get("_diablo_plain_class", cls)


def _opening(plain: Any) -> type | None:
    """The subclass of a module's class whose forward opens a pass; None where there can be none."""
    # The class keeps it: compiled graphs are of a class, and go with it.
    if (known := vars(plain).get("_diablo_opening_class")) is not None:
        return known
    is_usual = plain.__reduce_ex__ is object.__reduce_ex__ and plain.__reduce__ is object.__reduce__
    if plain.forward is nn.Module.forward or not is_usual:
        return None

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiled graph has its passes inside of its operators. What was made of this class elsewhere, or is called
        # by somebody who has kept the method of a model that was unloaded, opens none.
        if torch.compiler.is_compiling() or not (layers := adapted_layers(self)):
            return plain.forward(self, *args, **kwargs)
        passes = layers[0].passes
        current = passes.current()
        if current is None or current.changes != passes.changes:
            with left(passes.begin(layers, (args, kwargs))):
                return forward(self, *args, **kwargs)
        if current.is_claimed:
            return plain.forward(self, *args, **kwargs)
        current.is_claimed = True
        try:
            result = plain.forward(self, *args, **kwargs)
            current.mark(result)
        finally:
            current.is_claimed = False
        return result

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        # The class cannot be found by its name, which is that of the class it was made of.
        kept: Any = object.__reduce_ex__(self, max(2, protocol))
        _, (_, *args), *state = kept
        return _new, (plain, *args), *state

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(
            __module__=plain.__module__,
            __qualname__=plain.__qualname__,
            __doc__=plain.__doc__,
            __reduce_ex__=reduced,
            forward=forward,
            _diablo_plain_class=plain,
        )

    try:
        plain._diablo_opening_class = new_class(plain.__name__, (plain,), {}, fill)
    except Exception:
        # Some classes ask their subclasses for more. The layers inside then open their own passes.
        return None
    return plain._diablo_opening_class


def _new(plain: type, *args: Any) -> Any:
    return copyreg.__newobj__(_opening(plain) or plain, *args)  # type: ignore[attr-defined]
