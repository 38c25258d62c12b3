"""A recipe to begin with: the keys that most runs set, each with a comment that says what it does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from diablo.data.faults import RowFault
from diablo.data.reading.files import files_of, read_records_of
from diablo.data.reading.formats import format_of, proposed_columns
from diablo.data.reading.sources import read_sources
from diablo.recipes.data import Data
from diablo.recipes.reading import check_settings
from diablo.recipes.section import Section

# The keys that are written, where they have a value, and those of the sections among them.
_KEYS: dict[str, tuple[str, ...]] = {
    "model": (),
    "task": (),
    "data": ("train", "eval", "columns"),
    "chat": (),
    "method": ("name", "num_blocks"),
    "training": ("learning_rate", "epochs", "batch_size", "max_length"),
    "output": (),
    "merge": (),
}
_ENOUGH_TO_HOLD_OUT = 50
# Comments stand below each other up to this column, and behind longer lines.
_COLUMN = 40
_END = """
# All other keys, and what they allow: https://github.com/diablo-peft/diablo-peft/blob/main/docs/recipes.md
# For an editor that completes and checks keys: run "diablo schema --out recipe.schema.json" in this folder, and let the
# first line be "# yaml-language-server: $schema=recipe.schema.json".
"""


def starter_recipe(settings: Mapping[str, Any]) -> tuple[str, dict[str, list[RowFault]]]:
    """A commented recipe.

    Args:
        settings: what is known of it, as its YAML would have it. Where ``chat`` is not among them, it is true for data
            files with conversations. Where ``data.columns`` is not, they are guessed for a file that is in no format.
            Where ``data.eval`` is not, a tenth of the rows is held out if they are 50 or more.

    Returns:
        The YAML; and the malformed rows of each of its sources.

    Raises:
        UserError: the settings make no recipe, or a source cannot be read or has no usable row.
    """
    recipe = check_settings(settings)
    if recipe.data.columns is None and (columns := _guessed_columns(recipe.data)):
        settings = {**settings, "data": {**settings["data"], "columns": columns}}
        recipe = check_settings(settings)
    faults, has_conversations, count = {}, False, 0
    for source in (*(recipe.data.train or ()), *recipe.data.eval_sources):
        [found] = read_sources([source.resolved(recipe.data.columns)], kind=recipe.objective.rows, on_malformed="skip")
        faults[str(found.source.place)] = found.faults
        has_conversations |= any(row.messages for row in found.rows)
        count += len(found.rows)
    if recipe.data.train and recipe.data.eval is None and count >= _ENOUGH_TO_HOLD_OUT:
        settings = {**settings, "data": {**settings["data"], "eval": "10%"}}
    recipe = check_settings({"chat": has_conversations, **settings})
    if recipe.method.name == "diablo":
        training = {"learning_rate": "auto", **settings.get("training", {})}
        recipe = check_settings({"chat": has_conversations, **settings, "training": training})
    lines = list(_lines(recipe, _KEYS))
    width = min(_COLUMN, max(len(line) for line, _ in lines))
    return "".join(f"{line:<{width}}  # {comment}\n" for line, comment in lines) + _END, faults


def _guessed_columns(data: Data) -> dict[str, str] | None:
    """How the columns of the first training file make a prompt and a completion; None where it is in a format already.

    A file of two columns of text with other names has the prompt in the first one. The prompt ends with the name of
    what is to follow, and the completion begins with a space, or else the two would run together.
    """
    place = next((source.resolved(None).place for source in data.train or ()), None)
    if not isinstance(place, Path):
        return None
    record = next((record for _, record in read_records_of(files_of(place)[0])), None)
    if not isinstance(record, dict) or format_of(record) is not None:
        return None
    columns = proposed_columns(record)
    if columns is None and len(record) == 2 and all(isinstance(value, str) for value in record.values()):
        columns = dict(zip(("prompt", "completion"), record, strict=True))
    if columns is None:
        return None
    prompt, completion = columns["prompt"], columns["completion"]
    cue = completion.replace("_", " ").strip().capitalize()
    return {"prompt": f"{_filled(prompt)} {cue}:", "completion": f" {_filled(completion)}"}


def _filled(column: str) -> str:
    """The piece of a template that stands for a column."""
    return f"{{{{ {column} }}}}" if column.isidentifier() else f"{{{{ row[{json.dumps(column)}] }}}}"


def _lines(section: Section, keys: Mapping[str, tuple[str, ...]], indent: str = "") -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the description of its key."""
    written = section.model_dump(mode="json")
    for key, inner in keys.items():
        value, comment = getattr(section, key), type(section).model_fields[key].description or ""
        if isinstance(value, Section):
            if within := list(_lines(value, dict.fromkeys(inner, ()), indent + "  ")):
                yield f"{indent}{key}:", comment
                yield from within
        elif value is not None and value != []:
            yield f"{indent}{_yaml(key, written[key])}", comment


def _yaml(key: str, value: Any) -> str:
    """A key and its value in one line; a list of one is that one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    in_brackets = None if isinstance(value, (list, dict)) else False
    options: dict[str, Any] = {"allow_unicode": True, "width": float("inf"), "sort_keys": False}
    return yaml.safe_dump({key: value}, default_flow_style=in_brackets, **options).rstrip("\n")
