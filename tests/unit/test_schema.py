"""The schema of recipes, by which editors complete and check them, is that of the recipes which are read."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diablo.recipes.data import Data, DataSource
from diablo.recipes.methods import METHODS
from diablo.recipes.new_tokens import NewToken
from diablo.recipes.objectives import OBJECTIVES, RewardChoice, Vllm
from diablo.recipes.publishing import PushToHub
from diablo.recipes.reading import shipped_recipes
from diablo.recipes.recipe import Evaluation, Recipe
from diablo.recipes.schema import SCHEMA_FILE, recipe_schema, schema_text
from diablo.recipes.speed import Speed
from diablo.recipes.tracking import Tracking
from diablo.recipes.training import Optimizer, ParameterGroup, Training
from diablo.tasks import TASKS
from diablo_cli import completion

ROOT = Path(__file__).parents[2]
GOOD = {"model": "some/model", "task": "mawps", "output": "runs/x"}


def faults(settings: Any) -> list[str]:
    """What a validator finds in a recipe."""
    jsonschema = pytest.importorskip("jsonschema")
    return [error.message for error in jsonschema.Draft7Validator(recipe_schema()).iter_errors(settings)]


def test_the_shipped_file_is_the_schema_of_the_recipes_that_are_read():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), "run make schema"


def test_the_schema_is_one():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft7Validator.check_schema(recipe_schema())


def properties(schema: Any) -> Iterator[tuple[str, Any]]:
    for part in (schema, *schema["$defs"].values()):
        yield from part["properties"].items()


def test_every_key_is_there_with_its_description():
    found = dict(properties(recipe_schema()))
    sections = (
        Recipe,
        Data,
        DataSource,
        Training,
        Optimizer,
        ParameterGroup,
        PushToHub,
        NewToken,
        Speed,
        Tracking,
        Evaluation,
        *METHODS.values(),
        *OBJECTIVES.values(),
        RewardChoice,
        Vllm,
    )
    assert found.keys() == {key for section in sections for key in section.model_fields}
    for key, schema in properties(recipe_schema()):
        assert schema.get("description"), key


def test_every_key_has_a_row_on_the_page_about_recipes():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z_.]+`(?:, `[a-z_.]+`)*) \|", page, re.MULTILINE)
    shown = set()
    for first, *others in (re.findall(r"`([^`]+)`", row) for row in rows):
        # The rows of a section name it once: `training.epochs`, `.max_steps`.
        section, _, _ = first.rpartition(".")
        shown |= {first, *(section + other if other.startswith(".") else other for other in others)}
    sections = {"data": Data, "training": Training, "training.optimizer": Optimizer, "push_to_hub": PushToHub}
    sections |= {"speed": Speed, "tracking": Tracking, "evaluation": Evaluation}
    keys = {*Recipe.model_fields, *DataSource.model_fields}
    keys |= {f"{name}.{key}" for name, section in sections.items() for key in section.model_fields}
    keys |= {f"method.{key}" for method in METHODS.values() for key in method.model_fields}
    of_a_name = {"training.optimizer.name", "method.name", "method.type", "push_to_hub.repo"}
    assert keys - {*sections, *of_a_name} <= shown
    assert not {key for key in shown if key.partition(".")[0] in sections} - keys


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_is_valid_and_names_the_schema(name: str) -> None:
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve() == SCHEMA_FILE.resolve()
    assert faults(yaml.safe_load(text)) == []


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/other-trainers.md", 3)])
def test_the_recipes_of_a_page_are_valid(page: str, count: int) -> None:
    blocks = re.findall(r"```yaml\n(# recipe\.yaml\n.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == count
    for block in blocks:
        assert faults(yaml.safe_load(block)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "peft", "type": "GRALORA", "r": 4}},
        *({"method": name} for name in METHODS if name != "peft"),
        {"method": {}},
        {"method": {"num_blocks": 8, "block_pattern": {"v_proj": 4}}},
        {"method": {"name": "lora", "r": 4, "target_modules": "all-linear", "layers_to_transform": 1}},
        {"method": {"name": "miss", "target_modules": ["q_proj"], "layers_to_transform": [0, 1]}},
        {"task": ["mawps", "gsm8k"]},
        {"task": None, "data": {"train": "rows.jsonl"}},
        {"task": None, "data": {"train": ["a.csv", {"path": "b.csv", "columns": {"text": "x"}}], "eval": "5%"}},
        {"task": None, "data": {"train": {"hub": "a/b", "split": "train"}, "eval": 200}},
        {"evaluation": {"tasks": ["gsm8k", "boolq"]}, "training": {"learning_rate": 1e-3}},
    ],
    ids=str,
)
def test_what_a_recipe_may_hold_is_valid(change: Any) -> None:
    assert faults(GOOD | change) == []


@pytest.mark.parametrize(
    "change",
    [
        {"modle": 1},
        {"training": {"lerning_rate": 1e-3}},
        {"training": {"epochs": 0}},
        {"training": 5},
        {"method": "lorra"},
        {"method": {"name": "lora", "num_blocks": 3}},
        {"method": {"num_block": 3}},
        {"training": {"optimizer": "muom"}},
        {"training": {"optimizer": {"name": "lomo"}}},
        {"method": {"r": 4}},  # DiaBlo has none
        {"method": {"layers_to_transform": ["a"]}},
        {"task": "gsm"},
        {"task": "aqua"},  # it has no train split
        {"task": ["mawps", "mawps"]},
        {"evaluation": {"tasks": ["math10k"]}},  # it has no test split
        {"evaluation": {"tasks": "gsm8k"}},
        {"precision": "fp8"},
        {"data": {"train": [{"pth": "a.csv"}]}},
        {"data": {"train": {"path": "a.csv", "weight": 0}}},
        {"seed": 1.5},
    ],
    ids=str,
)
def test_a_mistake_is_not_valid(change: Any) -> None:
    assert faults(GOOD | change) != []


@pytest.mark.parametrize("key", ["model", "output"])
def test_what_a_recipe_must_hold_is_required(key: str) -> None:
    settings = copy.deepcopy(GOOD)
    del settings[key]
    assert faults(settings) == [f"'{key}' is a required property"]


def test_the_command_prints_the_file_and_writes_it(diablo, tmp_path):
    status, out, _ = diablo("schema")
    assert (status, out) == (0, SCHEMA_FILE.read_text(encoding="utf-8"))
    path = tmp_path / "recipe.schema.json"
    status, out, _ = diablo("schema", "--out", path)
    assert status == 0
    assert "# yaml-language-server: $schema=recipe.schema.json" in out
    assert json.loads(path.read_text(encoding="utf-8")) == recipe_schema()
    status, _, error = diablo("schema", "--out", tmp_path / "nowhere" / "schema.json")
    assert status == 2
    assert error.startswith("error: --out: ")


def test_names_to_complete_are_those_that_there_are():
    assert completion.allowed("method") == [name for name in METHODS if name != "peft"]
    assert set(completion.complete_task("")) == set(TASKS)
    assert set(shipped_recipes()) <= set(completion.complete_recipe(""))
