"""The recipes beside those of other trainers: each is a recipe, and says what the other one says."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from diablo.recipes.reading import load_recipe
from diablo.recipes.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "other-trainers.md").read_text(encoding="utf-8")
SAME_NAME = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "max_steps", "neftune_noise_alpha")
SAME_NAME += ("eval_steps", "save_steps", "logging_steps")
# Keys of which trainers take the same values. Others are names, switches or folders of their own.
SAME_VALUE = ("model", "method.r", "method.lora_alpha", "method.dropout", "training.max_length")
SAME_VALUE += ("training.batch_size", "training.gradient_accumulation", "training.epochs", "training.schedule")
SAME_VALUE += ("training.early_stopping_patience",)


def part(heading: str) -> str:
    return PAGE.partition(f"\n### {heading}\n")[2].partition("\n### ")[0]


def blocks(heading: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", part(heading), re.DOTALL)


def keys_of_the_same_meaning() -> dict[str, dict[str, list[str]]]:
    """Each trainer's keys by those of a recipe: ``keys["TRL"]["method.r"] == ["lora_r"]``."""
    head, _, *rows = [
        line.strip("| ").split(" | ") for line in part("Keys of the same meaning").splitlines() if "|" in line
    ]
    keys: dict[str, dict[str, list[str]]] = {trainer: {} for trainer in head}
    for row in rows:
        [key] = re.findall(r"`([\w.]+)(?:: \w+)?`", row[0])
        for trainer, cell in zip(head, row, strict=True):
            keys[trainer][key] = re.findall(r"`([\w.]+)(?:: \w+)?`", cell)
    assert len(keys["recipe"]) == len(rows) > 15
    return keys


def read_by_trl() -> tuple[dict[str, Any], list[str]]:
    """All that TRL's own parser makes of the command, and the names of what the command gives."""
    trl = pytest.importorskip("trl")
    classes = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
    words = shlex.split(blocks("From TRL's command", "console")[0].removeprefix("$ ").replace("\\\n", ""))
    assert words[:2] == ["trl", "sft"]
    # TRL's default of bf16 is not there on every machine.
    parsed = trl.TrlParser(classes).parse_args_and_config([*words[2:], "--bf16", "false"])
    settings = {field.name: getattr(each, field.name) for each in parsed for field in dataclasses.fields(each)}
    return settings, [word.removeprefix("--") for word in words if word.startswith("--")]


def settings_of(trainer: str) -> dict[str, Any]:
    """What the other trainer is told."""
    if trainer == "TRL":
        settings, given = read_by_trl()
        return {name: settings[name] for name in given}
    return dict(yaml.safe_load(blocks(f"From {trainer}", "yaml")[0]))


def recipe_of(trainer: str, folder: Path, *overrides: str) -> Recipe:
    heading = "From TRL's command" if trainer == "TRL" else f"From {trainer}"
    (folder / "recipe.yaml").write_text(blocks(heading, "yaml")[-1], encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def value_of(recipe: Recipe, key: str) -> Any:
    found: Any = recipe
    for name in key.split("."):
        found = getattr(found, name)
    return found


TRAINERS = pytest.mark.parametrize("trainer", ["Axolotl", "LLaMA-Factory", "TRL"])


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the recipes name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    talks = [[("human", f"the fox {n}?"), ("gpt", "the dog")] for n in range(40)]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in turns]} for turns in talks]
    Path("talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("faq.csv").write_text("question,answer\n" + "".join(f"{n}+1?,{n + 1}\n" for n in range(40)))


@TRAINERS
def test_a_recipe_beside_another_trainers_loads_and_its_method_can_be_changed_alone(
    tmp_path: Path, trainer: str
) -> None:
    recipe = recipe_of(trainer, tmp_path)
    assert recipe.method.name == "lora"
    changed = recipe_of(trainer, tmp_path, "method=diablo", "output=runs/with-blocks")
    assert changed.method.name == "diablo"
    assert changed.training == recipe.training


@TRAINERS
def test_a_recipe_beside_another_trainers_has_its_values(tmp_path: Path, trainer: str) -> None:
    recipe, settings = recipe_of(trainer, tmp_path), settings_of(trainer)
    names = keys_of_the_same_meaning()[trainer] | {f"training.{name}": [name] for name in SAME_NAME}
    compared = []
    for key in (*SAME_VALUE, *(f"training.{name}" for name in SAME_NAME)):
        theirs = [settings[name] for name in names[key] if name in settings]
        if theirs:
            ours = value_of(recipe, key)
            assert ours == theirs[0], key
            compared.append(key)
    assert len(compared) >= 11
    assert (recipe.quantization == "nf4") == bool(settings.get("load_in_4bit"))
    assert (recipe.training.gradient_checkpointing == "full") == settings.get("gradient_checkpointing", True)


@pytest.mark.parametrize(("trainer", "held_out"), [("Axolotl", 2), ("LLaMA-Factory", 4)])
def test_a_recipe_beside_another_trainers_takes_its_rows_as_they_are(
    diablo: Any, tiny_model: Path, tmp_path: Path, trainer: str, held_out: int
) -> None:
    recipe_of(trainer, tmp_path)
    changed = [f"model={tiny_model}", "precision=fp32", "quantization=null", "tracking.report_to=null"]
    status, out, err = diablo("train", "recipe.yaml", *changed, "--dry-run")
    assert status == 0, err
    assert f"training rows       {40 - held_out}:" in out
    assert f"held-out rows       {held_out}" in out


def test_keys_of_the_same_meaning_are_keys(tmp_path: Path) -> None:
    keys = keys_of_the_same_meaning()
    recipe = recipe_of("Axolotl", tmp_path)
    for key in keys["recipe"]:
        value_of(recipe, key)
    taken, _ = read_by_trl()
    for named in (*keys["TRL"].values(), SAME_NAME):
        assert set(named) <= taken.keys()
