"""The modules around adapted layers, each of which opens a pass when it is called outside of one."""

from __future__ import annotations

import copyreg
from functools import cache, wraps
from types import new_class
from typing import Any

import torch
from torch import nn

from diablo.tuner.layer import DiabloLayer


def connect(root: nn.Module) -> None:
    """Let all adapted layers of a model share their passes, and every module around them open one when it is called.

    Such a module becomes an instance of a subclass of its class, under the same name: its forward is that of its class,
    in a pass. Hooks would not do: torch does not call them where Ctrl-C ends a forward.

    Args:
        root: the model, in which the adapted layers are already.
    """
    layers = _layers_in(root)
    for layer in layers:
        layer.passes = layers[0].passes
    for module in root.modules():
        inside = _layers_in(module)
        if inside and not isinstance(module, DiabloLayer) and _can_open(module):
            module.__class__ = _opening(_plain(type(module)))
            vars(module).update(_diablo_passes=layers[0].passes, _diablo_layers=inside)


def disconnect(root: nn.Module) -> None:
    """Make the modules of a model what they were before :func:`connect`."""
    for module in root.modules():
        if (plain := _plain(type(module))) is not type(module):
            module.__class__ = plain
            del module._diablo_passes, module._diablo_layers


def adapted_layers(module: nn.Module) -> list[DiabloLayer]:
    """The adapted layers inside of a module that :func:`connect` has seen; none of another one."""
    return vars(module).get("_diablo_layers", [])


def _layers_in(module: nn.Module) -> list[DiabloLayer]:
    return [inner for inner in module.modules() if isinstance(inner, DiabloLayer)]


def _can_open(module: nn.Module) -> bool:
    """Whether a module has a forward, and is copied and pickled as modules usually are."""
    cls = type(module)
    is_usual = cls.__reduce_ex__ is object.__reduce_ex__ and cls.__reduce__ is object.__reduce__
    return cls is not _plain(cls) or (is_usual and cls.forward is not nn.Module.forward)


def _plain(cls: type) -> type:
    """The class that an opening one was made of, or the class itself."""
    return vars(cls).get("_diablo_plain_class", cls)


@cache
def _opening(plain: Any) -> type:
    """The subclass of a module's class whose forward opens a pass."""

    @wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiled graph has its passes inside of its operators.
        if torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        current = self._diablo_passes.current()
        if current is None:
            with self._diablo_passes.begin(self._diablo_layers, (args, kwargs)):
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

    return new_class(plain.__name__, (plain,), {}, fill)


def _new(plain: type, *args: Any) -> Any:
    return copyreg.__newobj__(_opening(plain), *args)  # type: ignore[attr-defined]
