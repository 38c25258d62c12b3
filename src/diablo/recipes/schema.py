"""The JSON schema of a recipe, from which editors complete keys and values, explain them and mark mistakes.

It is shipped as a file beside the recipes, so that neither an editor nor ``diablo schema`` has to import this package.
``python -m diablo.recipes.schema`` writes that file anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from diablo.recipes.recipe import Recipe
from diablo.recipes.section import Section
from diablo.recipes.training import OPTIMIZERS
from diablo.tasks import TASKS

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")
# Older than pydantic's, but nothing newer is used, and every editor reads it.
_DIALECT = "http://json-schema.org/draft-07/schema#"


class _ForEditors(GenerateJsonSchema):
    """A schema without what would only fill the tooltips."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Whether a key gets a title that is made of its name: it tells nothing new."""
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        """The schema of a key that has a default; a section's is its name, since its keys have their own."""
        found = super().default_schema(schema)
        if isinstance(default := schema.get("default"), Section):
            del found["default"]
            if name := getattr(default, "name", None):
                found["default"] = name
        return found


def recipe_schema() -> dict[str, Any]:
    """The schema of what a recipe's file may hold, short forms included, made from the sections and their fields.

    It knows keys, types, ranges and names. That settings fit to one another is checked only where a recipe is read.
    """
    schema = Recipe.model_json_schema(schema_generator=_ForEditors)
    train, test = ([name for name, task in TASKS.items() if split in task.splits] for split in ("train", "test"))
    _allow_only(train, schema["properties"]["task"])
    sections = schema["$defs"]
    _allow_only(test, sections["Evaluation"]["properties"]["tasks"])
    for section, key in (("Training", "optimizer"), ("Optimizer", "name")):
        _allow_only(OPTIMIZERS, sections[section]["properties"][key])
    return {"$schema": _DIALECT, **schema}


def schema_text() -> str:
    """The text of the schema's file."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def _allow_only(names: Sequence[str], schema: dict[str, Any]) -> None:
    """Allow a key, or the items of its lists, only some names, each of them once."""
    for kind in schema.get("anyOf", [schema]):
        if kind.get("type") == "array":
            kind["uniqueItems"] = True
            _allow_only(names, kind["items"])
        elif kind.get("type") == "string":
            kind["enum"] = list(names)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
