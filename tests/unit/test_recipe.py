"""A recipe's faults: each is one line that names the key, what was found and what is allowed."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from diablo.errors import UserError
from diablo.recipes.methods import DiabloMethod, FullMethod, LoraMethod, PeftMethod
from diablo.recipes.reading import load_recipe, shipped_recipes
from diablo.recipes.recipe import Recipe
from diablo.recipes.training import Optimizer, ParameterGroup, Training

GOOD = {"model": "some/model", "task": "mawps", "output": "runs/x"}


def write(folder: Path, settings: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings) if not isinstance(settings, str) else settings, encoding="utf-8")
    return path


def faults(folder: Path, settings: Any, overrides: tuple[str, ...] = ()) -> list[str]:
    """The lines of the error that a recipe leads to."""
    with pytest.raises(UserError) as caught:
        load_recipe(write(folder, settings), overrides)
    return str(caught.value).splitlines()


def test_good_recipe_loads_with_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.method == DiabloMethod()
    assert recipe.output == Path("runs/x")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"modle": 1}, ["modle: unknown key", "allowed: model, adapter, objective, task,"]),
        ({"seeds": 1}, ["seeds: unknown key", "Did you mean seed?"]),
        ({"epochs": 3}, ["epochs: unknown key", "Did you mean training.epochs?"]),
        ({"training": {"lerning_rate": 1}}, ["training.lerning_rate: unknown key", "Did you mean learning_rate?"]),
        ({"method": {"num_block": 3}}, ["method.num_block: unknown key", "Did you mean num_blocks?"]),
        (
            {"method": {"name": "lora", "num_blocks": 3}},
            ["method.num_blocks: unknown key", "allowed: name, target_modules"],
        ),
        ({"method": {"name": "full", "r": 3}}, ["method.r: unknown key", "allowed: name."]),
        ({"seed": "many"}, ["seed: found 'many'", "allowed: an integer of at least 0"]),
        ({"seed": -1}, ["seed: found -1", "allowed: an integer of at least 0"]),
        ({"seed": 1.5}, ["seed: found 1.5", "allowed: an integer"]),
        ({"seed": None}, ["seed: found None", "allowed: an integer"]),
        ({"chat": "perhaps"}, ["chat: found 'perhaps'", "allowed: true or false"]),
        ({"precision": "fp8"}, ["precision: found 'fp8'", "allowed: auto, bf16, fp16 or fp32"]),
        ({"model": ""}, ["model: found ''", "allowed: builtin:smollm2-135m"]),
        ({"model": 3}, ["model: found 3", "allowed: builtin:smollm2-135m"]),
        ({"training": 5}, ["training: found 5", "allowed: a section"]),
        ({"training": [1]}, ["training: found [1]", "allowed: a section"]),
        ({"training": {"learning_rate": 0}}, ["training.learning_rate: found 0", "allowed: a number above 0"]),
        ({"training": {"batch_size": 0}}, ["training.batch_size: found 0", "an integer of at least 1"]),
        # An endless number of epochs has no number of steps.
        ({"training": {"epochs": float("inf")}}, ["training.epochs: found inf", "allowed: a number above 0"]),
        ({"training": {"epochs": float("nan")}}, ["training.epochs: found nan", "allowed: a number above 0"]),
        ({"training": {"learning_rate": float("inf")}}, ["training.learning_rate: found inf"]),
        (
            {"training": {"optimizer": "adamw_8bits"}},
            ["training.optimizer: found 'adamw_8bits'", "Did you mean adamw_8bit?"],
        ),
        ({"training": {"optimizer": 3}}, ["training.optimizer: found 3", "allowed: muon, or the name of an optimizer"]),
        (
            {"training": {"optimizer": {"name": None}}},
            ["training.optimizer.name: found None", "the name of an optimizer"],
        ),
        ({"training": {"optimizer": {"beta": 1}}}, ["training.optimizer.beta: unknown key", "Did you mean betas?"]),
        (
            {"training": {"optimizer": {"betas": 0.9}}},
            ["training.optimizer.betas: found 0.9", "a list of numbers from 0"],
        ),
        ({"training": {"optimizer": {"betas": [0.9, 1]}}}, ["training.optimizer.betas: found 1", "below 1"]),
        (
            {"training": {"optimizer": {"options": {"a": {}}}}},
            ["training.optimizer.options: found {}", "a section of what"],
        ),
        (
            {"training": {"optimizer": {"groups": [{"lr": 1, "modules": ["q"]}]}}},
            ["training.optimizer.groups.lr: unknown"],
        ),
        (
            {"training": {"optimizer": {"groups": ["q_proj"]}}},
            ["training.optimizer.groups: found 'q_proj'", "a list of"],
        ),
        (
            {"training": {"optimizer": {"groups": [{"modules": ["q"]}]}}},
            ["training.optimizer.groups: found", "or both"],
        ),
        (
            {"training": {"optimizer": {"groups": [{"modules": [], "weight_decay": 0}]}}},
            ["training.optimizer.groups.modules: found []", "a list of module names"],
        ),
        ({"training": {"schedule": "cosin"}}, ["training.schedule: found 'cosin'", "linear, cosine", "mean cosine?"]),
        ({"training": {"min_learning_rate": 5e-4}}, ["training.min_learning_rate: found 0.0005; it must be below"]),
        ({"training": {"keep": "best"}}, ["training.keep: found best, without a held-out loss", "training.eval_steps"]),
        (
            {"training": {"early_stopping_patience": 3}},
            ["training.early_stopping_patience: found a number, without a held-out loss", "set training.eval_steps"],
        ),
        ({"training": {"early_stopping_patience": 0}}, ["training.early_stopping_patience: found 0", "at least 1"]),
        ({"training": {"ema": 1}}, ["training.ema: found 1", "a number between 0 and 1"]),
        ({"training": {"label_smoothing": 1}}, ["training.label_smoothing: found 1", "from 0 to below 1"]),
        ({"training": {"neftune_noise_alpha": 0}}, ["training.neftune_noise_alpha: found 0", "a number above 0"]),
        ({"evaluation": {"examples": -1}}, ["evaluation.examples: found -1", "an integer of at least 0"]),
        ({"data": {"on_long": "cut"}}, ["data.on_long: found 'cut'", "allowed: error, drop or"]),
        ({"method": "lorra"}, ["method: found", "'lorra'", "diablo, lora, rslora, dora, pissa, miss, full, peft"]),
        ({"method": {"name": None}}, ["method: found", "diablo, lora, rslora, dora, pissa, miss, full, peft"]),
        ({"method": 3}, ["method: found 3", "diablo, lora, rslora, dora, pissa, miss, full, peft"]),
        ({"method": {"dropout": 1}}, ["method.dropout: found 1", "from 0 to below 1"]),
        ({"method": {"num_blocks": 0}}, ["method.num_blocks: found 0", "an integer from 1"]),
        ({"method": {"block_pattern": {"v_proj": "x"}}}, ["method.block_pattern: found 'x'", "to num_blocks"]),
        ({"method": {"target_modules": ["q_proj", 3]}}, ["method.target_modules: found ['q_proj', 3]", "all-linear"]),
        ({"method": {"target_modules": 3}}, ["method.target_modules: found 3", "a list of module names"]),
        ({"method": {"layers_to_transform": [1, "a"]}}, ["method.layers_to_transform: found [1, 'a']", "integers"]),
        ({"method": {"layers_to_transform": True}}, ["method.layers_to_transform: found True", "integers"]),
        ({"task": "gsm"}, ["task: found 'gsm'", "allowed: mawps"]),
        ({"task": None}, ["task: nothing to train on", "data.train"]),
        ({"task": []}, ["task: nothing to train on", "data.train"]),
        ({"task": 3}, ["task: found 3", "a list of names"]),
        ({"task": ["mawps", 3]}, ["task: found ['mawps', 3]", "a list of names"]),
        ({"task": ["mawps", "mawps"]}, ["task: found ['mawps', 'mawps']", "name each task once"]),
        ({"task": ["mawps", "aqua"]}, ["task: found 'aqua', which has no train split"]),
        (
            {"evaluation": {"likelihood": True, "samples": 2, "temperature": 1}},
            ["evaluation.likelihood: found true", "leave out evaluation.samples"],
        ),
        ({"data": {"train": "a.jsonl"}}, ["data: task 'mawps' brings its own rows"]),
        ({"task": None, "data": {"train": "no/such.jsonl"}}, ["data.train: there is no file 'no/such.jsonl'"]),
        ({"task": "aqua"}, ["task: found 'aqua', which has no train split", "allowed: mawps, gsm8k, metamathqa"]),
        (
            {"evaluation": {"tasks": ["gsm"]}},
            ["evaluation.tasks: found 'gsm'", "allowed: mawps", "Did you mean gsm8k?"],
        ),
        ({"evaluation": {"tasks": ["math10k"]}}, ["evaluation.tasks: found 'math10k', which has no test split"]),
        ({"evaluation": {"tasks": ["gsm8k", "gsm8k"]}}, ["evaluation.tasks: found", "name each task once"]),
        ({"evaluation": {"tasks": []}}, ["evaluation.tasks: found []", "a list of task names"]),
        ({"evaluation": {"tasks": "gsm8k"}}, ["evaluation.tasks: found 'gsm8k'", "a list of task names"]),
        ({"evaluation": {"tasks": [3]}}, ["evaluation.tasks: found 3", "a list of task names"]),
        ({"evaluation": {"protocol": "authors"}}, ["evaluation.protocol: found 'authors'", "strict or paper"]),
        ({"evaluation": {"samples": 0}}, ["evaluation.samples: found 0", "an integer of at least 1"]),
        ({"evaluation": {"temperature": -1}}, ["evaluation.temperature: found -1", "a number of at least 0"]),
        ({"data": {"held_out": "validation"}}, ["data.held_out: found validation", "data.validation_rows"]),
        ({"data": {"columns": {"text": "a"}}}, ["data: task 'mawps' brings its own rows"]),
        ({"data": {"eval": "5%"}}, ["data.eval: found 5%, which is cut out of data.train", "data.validation_rows"]),
        ({"data": {"held_out": "train"}}, ["data.held_out: found 'train'", "test or validation"]),
        ({"data": {"validation_rows": 0}}, ["data.validation_rows: found 0", "an integer of at least 1"]),
        ({"evaluation": {"general": "no/such.txt"}}, ["evaluation.general: there is no file 'no/such.txt'"]),
        ({"evaluation": {"general": "pyproject.toml"}}, ["evaluation.general: there is no file", ".txt or .jsonl"]),
        ({"method": {"name": "miss", "lora_alpha": 3}}, ["method.lora_alpha: unknown key"]),
        ({"data": {"folder": "no/such"}}, ["data.folder: there is no folder 'no/such'"]),
        ({"data": {"folder": "."}}, ["data.folder: found '.', from which mawps reads nothing"]),
        ({1: 2}, ["1: unknown key", "allowed: model"]),
        ({None: 2}, ["None: unknown key", "allowed: model"]),
        ({"training": {1.5: 2}}, ["training.1.5: unknown key", "allowed: learning_rate"]),
        ({"method": {3: 2}}, ["method.3: unknown key", "allowed: name, target_modules"]),
        ({"method": "peft"}, ["method.type: missing", "a type of PEFT"]),
        ({"method": {"name": "peft", "type": 3}}, ["method.type: found 3", "a type of PEFT"]),
        (
            {"method": {"name": "peft", "type": "gralore"}},
            ["method.type: found 'gralore'", "allowed: PROMPT_TUNING,", "Did you mean GRALORA?"],
        ),
        ({"method": {"name": "peft", "type": "XLORA"}}, ["method.type: found XLORA", "trained already"]),
        (
            {"method": {"name": "peft", "type": "GRALORA", "gralora_kk": 2}},
            ["method.gralora_kk: unknown key", "allowed: name, type, r,", "Did you mean gralora_k?"],
        ),
        # What PEFT fills in itself is no key, and neither is what takes a config of its own.
        ({"method": {"name": "peft", "type": "GRALORA", "task_type": "X"}}, ["method.task_type: unknown key"]),
        ({"method": {"name": "peft", "type": "LORA", "eva_config": {}}}, ["method.eva_config: unknown key"]),
        ({"method": {"name": "peft", "type": "GRALORA", "r": "many"}}, ["method.r: found 'many'", "an integer"]),
        (
            {"method": {"name": "peft", "type": "MISS", "init_weights": "cat"}},
            ["method.init_weights: found 'cat'", "allowed: true or false or bat or mini"],
        ),
        # What only the config itself knows.
        (
            {"method": {"name": "peft", "type": "LILY", "num_B": 1}},
            ["method:", "num_B"],
        ),
        ({"method": {"name": "peft", "type": "PREFIX_TUNING"}}, ["method.num_virtual_tokens: missing; give an int"]),
        ({"method": {"name": "peft", "type": "ADAMSS", "use_asa": True}}, ["method.use_asa: found True", "every step"]),
        (
            {"method": {"name": "peft", "type": "LORA", "init_lora_weights": "corda"}},
            ["method.init_lora_weights: found 'corda'", "need data"],
        ),
        ({"method": {"name": "peft", "type": "GRALORA", 3: 2}}, ["method.3: unknown key"]),
    ],
)
def test_fault_is_one_line_with_key_found_and_allowed(tmp_path: Path, change: Any, parts: list[str]) -> None:
    lines = faults(tmp_path, GOOD | change)
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"train": []}, ["data.train: found []", "a file, a folder of files, a section"]),
        ({"train": 3}, ["data.train: found 3", "a file, a folder of files, a section"]),
        ({"train": ["rows.csv", 3]}, ["data.train: found ['rows.csv', 3]"]),
        ({"train": ["no/such.csv"]}, ["data.train: there is no file 'no/such.csv'; paths count from"]),
        ({"train": "notes.md"}, ["data.train: notes.md is not a dataset", ".jsonl, .json, .csv"]),
        ({"train": "empty"}, ["data.train: the folder 'empty' has no dataset file itself", ".jsonl, .json, .csv"]),
        ({"eval": "no/such.csv"}, ["data.eval: there is no file 'no/such.csv'"]),
        ({"train": {}}, ["data.train: found neither path nor hub; give path"]),
        ({"train": {"path": "rows.csv", "hub": "a/b"}}, ["data.train: found both path and hub"]),
        (
            {"train": {"path": "rows.csv", "split": "train", "revision": "x"}},
            ["data.train: found split, revision beside path 'rows.csv'; split is for hub"],
        ),
        ({"train": {"hub": "a/b", "streaming": True}}, ["data.train: found streaming: true", "with limit"]),
        ({"eval": {"hub": "a/b"}}, ["data.eval: found hub 'a/b' without split", "split: test"]),
        ({"eval": [{"path": "rows.csv", "weight": 2}]}, ["data.eval: found weight, which is for data.train"]),
        ({"train": ["rows.csv", {"pth": "x"}]}, ["data.train[1].pth: unknown key", "Did you mean path?"]),
        ({"train": [{"path": "rows.csv", "weight": 0}]}, ["data.train[0].weight: found 0", "a number above 0"]),
        ({"train": [{"path": "rows.csv", "weight": "x"}]}, ["data.train[0].weight: found 'x'"]),
        ({"eval": [{"path": "rows.csv", "limit": 0}]}, ["data.eval[0].limit: found 0", "an integer of at least 1"]),
        ({"train": [{"path": "rows.csv", "columns": 3}]}, ["data.train[0].columns: found 3", "a Jinja template"]),
        ({"train": [{"hub": "a/b", "revision": 1234}]}, ["data.train[0].revision: found 1234", "in quotes"]),
        ({"columns": {"prompt": 3, "completion": "x"}}, ["data.columns: found 3", "a Jinja template"]),
        ({"columns": {"prompt": "x"}}, ["data.columns: found prompt; give those of one format"]),
        (
            {"train": {"path": "rows.csv", "columns": {"text": "{{ a"}}},
            ["data.train.columns: found '{{ a' for text, which is no valid Jinja"],
        ),
        ({"eval": "0%"}, ["data.eval: found '0%'; a share is above 0% and below 100%"]),
        ({"eval": "-5%"}, ["data.eval: found '-5%'; a share is"]),
        ({"eval": 0}, ["data.eval: found 0; allowed: rows as an integer of at least 1, a share such as 5%"]),
        ({"eval": 0.05}, ["data.eval: found 0.05; allowed: rows as an integer"]),
        ({"eval": True}, ["data.eval: found True; allowed: rows as an integer"]),
    ],
)
def test_faults_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, parts: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("notes.md").touch()
    Path("rows.csv").touch()
    lines = faults(tmp_path, {"model": "m", "output": "o", "data": {"train": "rows.csv"} | change})
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("held_out", ["5%", 200, "rows.csv", ["rows.csv"], {"hub": "a/b", "split": "test"}, None])
def test_sources_are_short_for_sections_and_come_back_from_what_a_run_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").touch()
    recipes = [
        load_recipe(write(tmp_path, {"model": "m", "output": "o", "data": {"train": train, "eval": held_out}}))
        for train in ("rows.csv", ["rows.csv"], {"path": "rows.csv"}, [{"path": "rows.csv", "weight": 1}])
    ]
    assert all(recipe == recipes[0] for recipe in recipes)
    for mode in ("json", "python"):
        assert Recipe.model_validate(recipes[0].model_dump(mode=mode)) == recipes[0]
    assert recipes[0].model_dump(mode="json")["data"]["train"] == ["rows.csv"]
    assert recipes[0].has_held_out == (held_out is not None)


@pytest.mark.parametrize("key", ["model", "output"])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    [line] = faults(tmp_path, {name: value for name, value in GOOD.items() if name != key})
    assert line.startswith(f"{key}: missing; give ")


def test_each_of_several_faults_has_its_line(tmp_path: Path) -> None:
    lines = faults(tmp_path, {"task": "mawps", "output": "x", "seed": -1, "training": {"epochs": 0, "epoch": 1}})
    assert sorted(line.partition(":")[0] for line in lines) == ["model", "seed", "training.epoch", "training.epochs"]


def test_a_long_value_is_shortened(tmp_path: Path) -> None:
    [line] = faults(tmp_path, GOOD | {"seed": "z" * 5000})
    assert len(line) < 200


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    [line] = faults(tmp_path, GOOD | {"output": str(tmp_path / "taken")})
    assert line.startswith("output: ")
    assert "is a file" in line


@pytest.mark.parametrize("key", ["model", "data.train", "data.eval", "evaluation.general"])
def test_output_that_holds_what_is_read(tmp_path: Path, key: str) -> None:
    (tmp_path / "run" / "merged").mkdir(parents=True)
    rows, inside = tmp_path / "rows.jsonl", tmp_path / "run" / "merged" / "rows.jsonl"
    for path in (rows, inside):
        path.write_text("{}")
    settings = {"model": "m", "output": str(tmp_path / "run"), "data": {"train": str(rows)}}
    given = inside.parent if key == "model" else inside
    [line] = faults(tmp_path, settings, (f"{key}={given}",))
    for part in (f"output: {str(tmp_path / 'run')!r} holds {str(given)!r}, which {key} names", "give another folder"):
        assert part in line
    assert load_recipe(write(tmp_path, settings), (f"{key}={given}", f"output={tmp_path / 'other'}"))


@pytest.mark.parametrize("key", ["data.train", "evaluation.general", "adapter", "output"])
def test_a_path_that_the_system_does_not_take(tmp_path: Path, key: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    [line] = faults(tmp_path, GOOD, ("task=null", f"data.train={rows}", f"{key}={'a' * 300}.txt"))
    assert "cannot be read: File name too long; give another path." in line


def test_held_out_loss_without_held_out_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    settings = {"model": "m", "output": "o", "data": {"train": str(tmp_path / "rows.jsonl")}}
    [line] = faults(tmp_path, settings | {"training": {"eval_steps": 5}})
    assert line.startswith("training.eval_steps: there are no held-out rows")


def test_what_is_scored(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    own = {"task": None, "data": {"train": str(rows)}}
    asked = {"evaluation": {"tasks": ["gsm8k", "boolq"]}}
    for change, scored in (
        ({}, ["mawps"]),
        ({"task": "math10k"}, []),  # it has no test split
        (asked, ["gsm8k", "boolq"]),
        (own, []),
        (own | asked, ["gsm8k", "boolq"]),
    ):
        assert load_recipe(write(tmp_path, GOOD | change)).scored == scored


def test_one_task_is_short_for_a_list_of_one(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD)) == load_recipe(write(tmp_path, GOOD | {"task": ["mawps"]}))
    several = load_recipe(write(tmp_path, GOOD | {"task": ["mawps", "math10k", "gsm8k"]}))
    assert several.scored == ["mawps", "gsm8k"]


def test_held_out_loss_of_a_task_without_a_test_split(tmp_path: Path) -> None:
    [line] = faults(tmp_path, GOOD | {"task": "math10k", "training": {"eval_steps": 5}})
    assert line.startswith("training.eval_steps: there are no held-out rows")


def test_missing_file_lists_the_shipped_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recipe file '.*absent.yaml'.*quickstart"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="no recipe file"):
        load_recipe(tmp_path)  # a folder


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: m\ntask: [1\noutput: x\n", "not valid YAML in line 3"),
        ("model: m\n\ttask: x\n", "not valid YAML in line 2"),
        ("model: m\nseed: 2026-13-45\n", "not valid YAML"),  # PyYAML raises a bare ValueError for such a date
        ("model: " + "[" * 3000, "not valid YAML"),
        ("seed: 1" + "0" * 5000, "not valid YAML"),  # more digits than Python reads
        ("- a\n- b\n", "found list"),
        ("just words", "found str"),
        ("", "found NoneType"),
    ],
)
def test_file_that_holds_no_settings(tmp_path: Path, text: str, part: str) -> None:
    [line] = faults(tmp_path, text)
    assert part in line
    assert "recipe.yaml" in line


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("model: mod\xe8le\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not a text file in UTF-8 \(byte 10"):
        load_recipe(path)


@pytest.mark.parametrize("override", ["seed", "", "=3", "--seed"])
def test_override_without_key_or_value(tmp_path: Path, override: str) -> None:
    [line] = faults(tmp_path, GOOD, (override,))
    assert "must look like section.key=value" in line
    assert repr(override) in line


@pytest.mark.parametrize("value", ["[1", "2026-13-45", "[" * 3000])
def test_override_that_is_no_yaml(tmp_path: Path, value: str) -> None:
    [line] = faults(tmp_path, GOOD, (f"seed={value}",))
    assert line.startswith("seed: ")
    assert "not a valid YAML value" in line


def test_override_of_unknown_and_of_bad_keys(tmp_path: Path) -> None:
    [line] = faults(tmp_path, GOOD, ("training.epohs=2",))
    assert line.startswith("training.epohs: unknown key")
    [line] = faults(tmp_path, GOOD, ("training.epochs=-2",))
    assert line.startswith("training.epochs: found -2")


def test_override_inside_something_that_is_no_section(tmp_path: Path) -> None:
    # Whether the file or the override is to blame, the line must name the key.
    [line] = faults(tmp_path, GOOD | {"training": 5}, ("training.epochs=2",))
    assert line.startswith("training: found 5")
    [line] = faults(tmp_path, GOOD | {"training": [1, 2]}, ("training.epochs=2",))
    assert line.startswith("training: found [1, 2]")
    [line] = faults(tmp_path, GOOD, ("seed.more=2",))
    assert line.startswith("seed: found")


def test_overrides_are_applied_in_order_and_reach_nested_keys(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"training": {"epochs": 3, "batch_size": 4}})
    overrides = ["training.epochs=5", "--training.epochs=7", "method.block_pattern.v_proj=8", "evaluation.before=false"]
    recipe = load_recipe(path, overrides)
    assert (recipe.training.epochs, recipe.training.batch_size) == (7, 4)
    assert isinstance(recipe.method, DiabloMethod)
    assert recipe.method.block_pattern == {"v_proj": 8}
    assert recipe.evaluation.before is False


def test_method_override_replaces_the_section(tmp_path: Path) -> None:
    # num_blocks would be an unknown key of LoRA's, so that quickstart could not be run with another method.
    path = write(tmp_path, GOOD | {"method": {"name": "diablo", "num_blocks": 8}})
    assert load_recipe(path, ["method=lora"]).method == LoraMethod(name="lora")
    assert load_recipe(path, ["method=lora", "method.r=4"]).method == LoraMethod(name="lora", r=4)
    assert load_recipe(path, ["method=full"]).method == FullMethod(name="full")
    # Naming the method that it already is must not throw its options away.
    assert load_recipe(path, ["method=diablo"]).method == DiabloMethod(num_blocks=8)


def test_method_in_short_form(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"method": "dora"})
    assert load_recipe(path, ["method.r=2"]).method == LoraMethod(name="dora", r=2)


def test_optimizer_in_short_form_and_as_an_override(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD | {"training": {"optimizer": "sgd"}})
    told = load_recipe(path, ["training.optimizer.options.momentum=0.9"])
    assert told.training.optimizer == Optimizer(name="sgd", options={"momentum": 0.9})
    # Options of another optimizer mean nothing to the one that replaces it.
    path = write(tmp_path, GOOD | {"training": {"optimizer": {"name": "sgd", "options": {"momentum": "9e-1"}}}})
    assert load_recipe(path, ["training.optimizer=sgd"]) == told
    assert load_recipe(path, ["training.optimizer=rmsprop"]).training.optimizer == Optimizer(name="rmsprop")
    path = write(tmp_path, GOOD | {"training": {"optimizer": {"betas": [0.9, 0.95]}}})
    assert load_recipe(path).training.optimizer == Optimizer(name="adamw_torch_fused", betas=[0.9, 0.95])


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_numbers_with_an_exponent(tmp_path: Path, text: str) -> None:
    # YAML 1.1 reads 1e-3 as a string, where people mean the number.
    path = write(tmp_path, f"model: m\ntask: mawps\noutput: o\ntraining:\n  learning_rate: {text}\n")
    assert load_recipe(path).training.learning_rate == 1e-3
    assert load_recipe(path, [f"training.weight_decay={text}"]).training.weight_decay == 1e-3


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_loads_by_name_and_path(name: str) -> None:
    assert load_recipe(name) == load_recipe(shipped_recipes()[name])


def test_quickstart_is_shipped() -> None:
    assert "quickstart" in shipped_recipes()


def field_names(section: Any = Recipe) -> list[str]:
    return list(section.model_fields)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["diablo", "lora", "full", "mawps", "auto", "1e-3", "\0", "q" * 300])
)
keys = (
    st.sampled_from([*field_names(), *field_names(DiabloMethod), *field_names(LoraMethod), "train", "limit"])
    | st.sampled_from([*field_names(Training), *field_names(Optimizer), *field_names(ParameterGroup)])
    | scalars
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)
good_start = st.sampled_from([{}, GOOD, GOOD | {"method": {"name": "lora"}}])


@given(good_start, st.dictionaries(keys, values, max_size=5), st.lists(st.tuples(keys, keys, scalars), max_size=2))
@settings(max_examples=150, deadline=None)
def test_no_settings_raise_anything_but_a_user_error(start: Any, change: Any, changes: Any) -> None:
    overrides = [f"{first}.{second}={value}" for first, second, value in changes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(start | change, allow_unicode=True), encoding="utf-8")
        with contextlib.suppress(UserError):
            assert isinstance(load_recipe(path, overrides), Recipe)


def test_a_type_of_peft_takes_its_own_keys_and_its_name_in_any_case(tmp_path: Path) -> None:
    method = {"name": "peft", "type": "gralora", "r": 32, "alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    recipe = load_recipe(write(tmp_path, GOOD | {"method": method}), ["method.gralora_k=4"])
    assert isinstance(recipe.method, PeftMethod)
    assert recipe.method.type == recipe.method.title == "GRALORA"
    assert recipe.method.target_modules == ["q_proj", "v_proj"]
    assert recipe.method.options == {"r": 32, "alpha": 64, "target_modules": ["q_proj", "v_proj"], "gralora_k": 4}
    # A recipe that was written down is the same recipe.
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_each_fault_of_a_type_of_peft_has_its_line(tmp_path: Path) -> None:
    method = {"name": "peft", "type": "GRALORA", "rr": 3, "alpha": "many"}
    lines = faults(tmp_path, GOOD | {"method": method, "seed": -1})
    assert sorted(line.partition(":")[0] for line in lines) == ["method.alpha", "method.rr", "seed"]
