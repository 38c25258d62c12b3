"""Functions of the user's that reward completions: loaded from a file, called, and what they give checked."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from diablo.errors import UserError, did_you_mean, first_line, shortened

_KEY = "objective.rewards"


def file_and_function(name: str) -> tuple[str, str]:
    """The parts of ``FILE.py:FUNCTION``; two empty texts where a name is not of that form."""
    path, _, function = name.rpartition(":")
    return (path, function) if path.endswith(".py") and function.isidentifier() else ("", "")


class OwnFunction:
    """A function of a file, called as TRL calls reward functions: with lists, by keyword, for a list of numbers.

    Args:
        path: the file, which is imported. It may import files beside it.
        name: the function's name.

    Raises:
        UserError: the file cannot be imported, or has no such function.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.title = f"{path}:{name}"
        try:
            self.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{_KEY}: {str(path)!r} cannot be read ({first_line(error)}).") from None
        module = _imported(path, self.digest)
        found = vars(module).get(name)
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        if found is None:
            listed = ", ".join(own) or "none"
            raise UserError(f"{_KEY}: {path} has no function {name!r}; it has: {listed}.{did_you_mean(name, own)}")
        if not callable(found):
            raise UserError(f"{_KEY}: {name} of {path} is {shortened(found)}, not a function.")
        if inspect.iscoroutinefunction(found):
            raise UserError(
                f"{_KEY}: {self.title} is asynchronous, and rewards are asked for one after the other; "
                "write it with def, and run what it awaits with asyncio.run."
            )
        self.function: Callable[..., Any] = found
        parameters = inspect.signature(found).parameters.values()
        self._takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        self._taken = {each.name for each in parameters if each.kind not in _ALL_OTHERS}
        self._needed = [each.name for each in parameters if each.kind not in _ALL_OTHERS and each.default is each.empty]

    def check_arguments(self, given: Iterable[str]) -> None:
        """Check that the function asks for nothing that it is not given.

        Raises:
            UserError: it does.
        """
        given = list(given)
        if missing := [name for name in self._needed if name not in given]:
            raise UserError(
                f"{_KEY}: {self.title} asks for {', '.join(missing)}, which the first row does not have; it is given "
                f"{', '.join(given)}. Take others, or give {missing[0]} a default."
            )

    def __call__(self, rows: Sequence[str], **columns: list[Any]) -> list[float]:
        """A number for each completion.

        Args:
            rows: what the rows are called in messages.
            columns: the arguments, each a list with a value for each row; the function is given those that it takes.

        Raises:
            UserError: the function fails, or gives something else.
        """
        given = {key: values for key, values in columns.items() if self._takes_all or key in self._taken}
        try:
            values = self.function(**given)
        except Exception as error:
            where, fault = self._failing(rows, given), _fault(error, self.path)
            raise UserError(f"{_KEY}: {self.title} fails on {where}: {fault}.") from None
        try:
            values = list(values)
        except TypeError:
            raise UserError(
                f"{_KEY}: {self.title} gave {shortened(values)}; give a list with a number for each completion."
            ) from None
        if len(values) != len(rows):
            raise UserError(
                f"{_KEY}: {self.title} gave {len(values)} values for {len(rows)} completions; give one for each."
            )
        return [self._number(value, row) for value, row in zip(values, rows, strict=True)]

    def record(self) -> dict[str, str]:
        """The file, its digest and the function's name."""
        return {"file": str(self.path), "sha256": self.digest, "function": self.name}

    def _number(self, value: Any, row: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{_KEY}: {self.title} gave {shortened(value)} for a completion of {row}; give a finite number for "
                "each."
            )
        return number

    def _failing(self, rows: Sequence[str], given: dict[str, list[Any]]) -> str:
        """The first row that the function fails on alone; all of them where it fails on none."""
        for index, row in enumerate(rows):
            try:
                self.function(**{key: [values[index]] for key, values in given.items()})
            except Exception:
                return row
        return ", ".join(dict.fromkeys(rows))


_ALL_OTHERS = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _imported(path: Path, digest: str) -> ModuleType:
    """The module of a file with such contents, which is imported once.

    Raises:
        UserError: the file cannot be imported.
    """
    own = hashlib.sha256(f"{path.resolve()} {digest}".encode()).hexdigest()
    name = f"diablo_rewards_of_{path.stem}_{own[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    # The name ends in .py.
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As in a script, files beside it can be imported; and a data class looks its own module up.
    sys.path.insert(0, str(path.resolve().parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{_KEY}: {path} cannot be imported: {_fault(error, path)}.") from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _fault(error: Exception, path: Path) -> str:
    """What an error says, and at which line of the file."""
    own = path.resolve()
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == own]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f"line {lines[-1]}: " if lines and lines[-1] else ""
    said = first_line(error).rstrip(".")
    return f"{where}{type(error).__name__}" + (f": {said}" if said != type(error).__name__ else "")
