"""Calls a function as soon as another package is imported, without importing it itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, then: Callable[[], object]) -> None:
    """Call a function once a package has been imported: now if it has been already, and otherwise when it is.

    The function is called before the import statement returns, and what it raises is raised by that statement. An
    import that fails calls nothing; the next one that succeeds does. In rare cases the function is called twice: it
    must allow that.

    Args:
        name: the name of a package, without a dot.
        then: the function.
    """
    hook = _Hook(name, then)
    # The hook comes first and the look second: another thread may import the package in between.
    sys.meta_path.insert(0, hook)
    if sys.modules.get(name) is not None:
        hook.remove()
        then()


class _Hook(MetaPathFinder):
    """Finds the package as the finders after this one do, and sees to it that the function is called."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The package's spec with a loader that calls the function; None for any other module."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        # The finders before this one have been asked. To ask them again could go round in a circle with other hooks.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find: Any = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find else None
            if spec is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def remove(self) -> None:
        """Take no further part in imports."""
        with suppress(ValueError):
            sys.meta_path.remove(self)


class _Loader:
    """The loader of a package in everything, but for the call behind the package's own code."""

    def __init__(self, loader: Any, hook: _Hook) -> None:
        self._loader, self._hook = loader, hook

    def __getattr__(self, name: str) -> Any:
        # A copy of this object asks for attributes before it has any.
        return getattr(object.__getattribute__(self, "_loader"), name)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the package, and then call the function."""
        # From here on, everybody who asks sees the package's own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._hook.then()
        self._hook.remove()
