"""The modules around adapted layers: each of them opens a pass when it is called outside of one."""

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
    """Let all adapted layers of a model share their passes, and let every module around them open passes.

    Such a module becomes an instance of a subclass of its class, under the same name. Its forward is the forward of its
    class, inside a pass. Two other ways do not work. Hooks: torch does not call them where Ctrl-C ends a forward. A
    ``forward`` among the module's attributes: where the layers of a model are compiled one by one, the compiler would
    compile each of them anew.

    Args:
        root: the model, with the adapted layers in it.
    """
    layers = _layers_in(root)
    # Graphs from before this call refer to the passes of the layers that existed then. So these passes go on.
    known = next((layer for module in root.modules() for layer in adapted_layers(module)), layers[0])
    for layer in layers:
        layer.passes = known.passes
    modules = [module for module in root.modules() if not isinstance(module, DiabloLayer)]
    around = [module for module in modules if _layers_in(module)]
    # Wrappers that shard a model look for all modules of one class. So a class is replaced in all of its modules or in
    # none: where only some of them have adapted layers inside, it is not replaced.
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


# The compiler takes a weak reference for the object that it refers to.
@torch.compiler.disable
def adapted_layers(module: nn.Module) -> list[DiabloLayer]:
    """The adapted layers inside of a module that opens passes; an empty list for any other module."""
    inside: _Inside | None = vars(module).get("_diablo_inside")
    return [] if inside is None else inside.layers(module)


class _Inside:
    """The adapted layers inside of a module, by weak references.

    A copy of the module finds its own layers.
    """

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
    """The class that a class made by :func:`_opening` was made from; any other class itself."""
    return vars(cls).get("_diablo_plain_class", cls)


def _opening(plain: Any) -> type | None:
    """The subclass of a module's class whose forward opens a pass; None where it cannot be made."""
    # The plain class keeps the subclass, so that it is made once. Compiled graphs belong to a class and vanish with it.
    if (known := vars(plain).get("_diablo_opening_class")) is not None:
        return known
    is_usual = plain.__reduce_ex__ is object.__reduce_ex__ and plain.__reduce__ is object.__reduce__
    if plain.forward is nn.Module.forward or not is_usual:
        return None

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # In a compiled graph the operators open the passes. A module without adapted layers opens none either: somebody
        # may make another module of this class, or keep this method after the adapters were unloaded.
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
        # Pickle finds a class by its name, and this class has the name of the plain one. So the plain class is pickled.
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
        # Some classes require more of their subclasses. The layers inside then open passes of their own.
        return None
    return plain._diablo_opening_class


def _new(plain: type, *args: Any) -> Any:
    return copyreg.__newobj__(_opening(plain) or plain, *args)  # pyrefly: ignore[missing-attribute]
