"""Reading a recipe: its YAML, what overrides it, and one line for each fault."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diablo.errors import UserError, did_you_mean, shortened
from diablo.recipes.data import Data, DataSource
from diablo.recipes.methods import METHODS
from diablo.recipes.new_tokens import NewToken
from diablo.recipes.objectives import OBJECTIVES, GroupObjective, RewardChoice
from diablo.recipes.publishing import PushToHub
from diablo.recipes.recipe import Evaluation, Recipe
from diablo.recipes.section import EXPLAINED, Section
from diablo.recipes.speed import Speed
from diablo.recipes.tracking import Tracking
from diablo.recipes.training import DEFAULT_OPTIMIZER, Optimizer, ParameterGroup, Training


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, or the name of a recipe that diablo ships, such as ``quickstart``.
        overrides: ``section.key=value`` strings, applied in order; values are YAML.

    Raises:
        UserError: with one line for each fault, naming the key, what was found and what is allowed.
    """
    settings = _read_yaml(source)
    for override in overrides:
        _apply_override(settings, override)
    return check_settings(settings)


def check_settings(settings: Mapping[str, Any]) -> Recipe:
    """The recipe of some settings, which are as its YAML would have them.

    Raises:
        UserError: with one line for each fault, as :func:`load_recipe`.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_explain(fault) for fault in error.errors()))) from None
    except OSError as error:
        # A name that is too long, or a folder that may not be looked into.
        raise UserError(f"{shortened(error.filename)} cannot be read: {error.strerror}; give another path.") from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name; those of the paper's tables are called ``paper/...``."""
    folder = Path(str(resources.files("diablo") / "recipes"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


_OF_ROWS = (".csv", ".jsonl", ".parquet", ".tsv", ".xlsx")
# A date with a month of 13 or a number of 5000 digits is a bare ValueError, deep nesting a RecursionError.
_YAML_FAULTS = (yaml.YAMLError, ValueError, RecursionError)


def _read_yaml(source: str | Path) -> dict[str, Any]:
    shipped = shipped_recipes()
    path = shipped.get(str(source), Path(source))
    if not path.is_file():
        general = ", ".join(name for name in shipped if "/" not in name)
        raise UserError(
            f"There is no recipe file {str(source)!r}; give a YAML file, {general}, or one of the paper's, which "
            f"docs/paper-recipes.md lists."
            f"{did_you_mean(str(source), shipped)}"
        )
    if path.suffix.lower() in _OF_ROWS:
        raise UserError(
            f"{path} is a file of rows, and no recipe; write one that trains on it with: "
            f"diablo init --data {shlex.quote(str(path))}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 (byte {error.start} cannot be read).") from None
    except _YAML_FAULTS as error:
        where = f" in line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise UserError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold settings as 'key: value' lines, found {type(settings).__name__}.")
    return settings


def _apply_override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.lstrip("-")
    if not equals or not key:
        raise UserError(f"The override {override!r} must look like section.key=value, for example training.epochs=2.")
    try:
        value = yaml.safe_load(text)
    except _YAML_FAULTS:
        raise UserError(f"{key}: {shortened(text)} is not a valid YAML value; quote it.") from None
    *sections, last = key.split(".")
    for name in sections:
        # `method: lora` is short for `method: {name: lora}`, `push_to_hub: a/b` for `push_to_hub: {repo: a/b}`.
        inner = settings.get(name)
        if not (inner is None or isinstance(inner, (str, dict))):
            raise UserError(f"{name}: found {shortened(inner)}; it is no section that {key} could be set in.")
        alone = "repo" if name == "push_to_hub" else "name"
        settings[name] = inner = {alone: inner} if isinstance(inner, str) else dict(inner or {})
        settings = inner
    replaced = settings.get(last)
    if last in _NAMED and isinstance(replaced, dict) and isinstance(value, str):
        # The options of the method that is replaced mean nothing to another one.
        value = replaced if replaced.get("name", _NAMED[last]) == value else value
    settings[last] = value


_SECTIONS: dict[int | str, type[Section]] = {
    "data": Data,
    "training": Training,
    "optimizer": Optimizer,
    "groups": ParameterGroup,
    "speed": Speed,
    "tracking": Tracking,
    "evaluation": Evaluation,
    "push_to_hub": PushToHub,
    "new_tokens": NewToken,
}
_LISTS: dict[tuple[type[Section], int | str], type[Section]] = {
    (Data, "train"): DataSource,
    (Data, "eval"): DataSource,
    (GroupObjective, "rewards"): RewardChoice,
}
# Sections for which their name alone may stand, and the name that they have where none is given.
_NAMED = {"method": "diablo", "optimizer": DEFAULT_OPTIMIZER, "objective": "sft"}
# Sections of several kinds: pydantic names the kind next, which is no key.
_KINDS: dict[int | str, Mapping[str, type[Section]]] = {"method": METHODS, "objective": OBJECTIVES}


def _explain(fault: Any) -> str:
    """What one of pydantic's findings says to the user: one line, or several from a check that finds several."""
    if not fault["loc"] or fault["type"] == EXPLAINED:
        return str(fault["msg"]).removeprefix("Value error, ")
    owner, path = _locate(fault["loc"])
    key, last = ".".join(path), path[-1].partition("[")[0]
    if fault["type"] in ("extra_forbidden", "invalid_key"):
        allowed = list(owner.model_fields)
        inside = [
            name
            for name, section in _SECTIONS.items()
            if owner is Recipe and name in allowed and last in section.model_fields
        ]
        within = f" Did you mean {inside[0]}.{last}?" if inside else did_you_mean(last, allowed)
        return f"{key}: unknown key; allowed: {', '.join(allowed)}.{within}"
    description = owner.model_fields[last].description
    if fault["type"] == "missing":
        return f"{key}: missing; give {description}."
    return f"{key}: found {shortened(fault['input'])}; allowed: {description}."


def _locate(location: tuple[int | str, ...]) -> tuple[type[Section], list[str]]:
    """The section that a finding is about, and its key as the user wrote it."""
    owner: type[Section] = Recipe
    inner: type[Section] | None = Recipe
    path: list[str] = []
    parts = iter(location)
    for part in parts:
        if inner is None:
            break  # inside a value, such as the second name of a list
        owner = inner
        path.append(str(part))
        inner = _SECTIONS.get(part)
        if (owner, part) in _LISTS:
            # Which section of the list comes next, behind a word of pydantic's for what the key is.
            number = next((each for each in parts if isinstance(each, int)), None)
            inner = None if number is None else _LISTS[owner, part]
            path[-1] += "" if number is None else f"[{number}]"
        if part in _KINDS:
            inner = _KINDS[part].get(str(next(parts, None)))
        elif part in ("groups", "new_tokens"):
            # Their number in the list, which is no key either.
            next(parts, None)
    return owner, path
