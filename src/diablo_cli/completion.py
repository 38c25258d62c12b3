"""What a shell completes, and the names for it.

Names are read from files of the package ``diablo``: importing what knows them takes longer than one waits at a Tab.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def recipes_folder() -> Path:
    """The folder of the shipped recipes and of their schema."""
    spec = find_spec("diablo")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "recipes"


def schema_text() -> str:
    """The JSON schema of a recipe, as it is shipped."""
    return (recipes_folder() / "recipe.schema.json").read_text(encoding="utf-8")


def allowed(*key: str) -> list[str]:
    """The names that a recipe allows at a key, such as ``"evaluation", "tasks"``."""
    schema = json.loads(schema_text())
    inner = schema
    for name in key:
        inner = _followed(schema, inner)["properties"][name]
    return list(dict.fromkeys(_names(inner)))


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes and YAML files."""
    folder = recipes_folder()
    shipped = (path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.yaml")))
    # A path is completed as it was typed, folder by folder.
    typed = incomplete[: incomplete.rfind("/") + 1]
    files, folders = [], []
    # A folder that is not there, or may not be looked into, has nothing to complete.
    with contextlib.suppress(OSError):
        for path in sorted(Path(typed or ".").expanduser().iterdir()):
            if path.is_dir():
                folders.append(f"{typed}{path.name}/")
            elif path.suffix in (".yaml", ".yml"):
                files.append(f"{typed}{path.name}")
    found = _starting(incomplete, [*shipped, *files])
    # Where there are folders alone, the shell completes better: it puts no space behind one.
    return found and found + _starting(incomplete, [name for name in folders if not name.startswith(f"{typed}.")])


def complete_task(incomplete: str) -> list[str]:
    """The name of a task."""
    return _starting(incomplete, dict.fromkeys(allowed("task") + allowed("evaluation", "tasks")))


def complete_trained_tasks(incomplete: str) -> list[str]:
    """Names of tasks that can be trained on, separated by commas."""
    return _next_of_list(incomplete, allowed("task"))


def complete_scored_tasks(incomplete: str) -> list[str]:
    """Names of tasks that can be scored, separated by commas."""
    return _next_of_list(incomplete, allowed("evaluation", "tasks"))


def complete_methods(incomplete: str) -> list[str]:
    """Names of methods, separated by commas."""
    return _next_of_list(incomplete, allowed("method"))


def complete_optimizers(incomplete: str) -> list[str]:
    """Names of optimizers, separated by commas."""
    return _next_of_list(incomplete, allowed("training", "optimizer"))


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _next_of_list(incomplete: str, names: Iterable[str]) -> list[str]:
    before, comma, _ = incomplete.rpartition(",")
    return _starting(incomplete, [f"{before}{comma}{name}" for name in names if name not in before.split(",")])


def _followed(schema: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
    """A part of a schema, or the section that it refers to."""
    reference = inner.get("$ref")
    return schema["$defs"][reference.rpartition("/")[2]] if reference else inner


def _names(schema: dict[str, Any]) -> Iterable[str]:
    """The names that a key, or the items of its lists, may have."""
    yield from schema.get("enum", [])
    for inner in (*schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])):
        yield from _names(inner)
