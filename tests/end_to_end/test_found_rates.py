"""The learning rate that a run finds in the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig, suggested_learning_rate


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"How many apples are {n} and 3?", "completion": f" x = {n} + 3"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {tmp_path / 'rows.jsonl'}}}\nmethod: {{name: diablo, num_blocks: 4}}\n"
        "training: {learning_rate: auto, batch_size: 4, schedule: constant, logging_steps: 1}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


@pytest.mark.parametrize(
    "optimizer",
    ["adamw_torch_fused", "{name: adafactor, groups: [{modules: [down_proj], learning_rate: 1.0e-4}]}", "lion_32bit"],
)
def test_a_run_trains_with_the_rate_that_its_weights_suggest(
    recipe: Path, tiny_model: Path, tmp_path: Path, diablo: Any, optimizer: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = suggested_learning_rate(get_peft_model(model, DiabloConfig(num_blocks=4)), steps=30)
    status, out, error = diablo("train", recipe, "training.max_steps=30", f"training.optimizer={optimizer}")
    assert status == 0, error
    assert f"learning rate: {expected:g}, found in the weights for these blocks and 30 steps of sft" in out + error
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["training"]["optimizer"]["lr"] == expected
    assert record["recipe"]["training"]["learning_rate"] == expected
    logged = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in logged if "loss" in line] == [expected] * 30
    # What was asked for is kept as it was asked, so that another number of blocks finds its own rate.
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["learning_rate"] == "auto"


def test_the_plan_says_that_the_rate_is_to_be_found_and_which_it_is(
    recipe: Path, tiny_model: Path, diablo: Any
) -> None:
    status, out, _ = diablo("train", recipe, "--dry-run")
    assert status == 0
    assert "learning rate       auto: found in the weights, when they are loaded" in out
    status, out, _ = diablo("plan", recipe)
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = suggested_learning_rate(get_peft_model(model, DiabloConfig(num_blocks=4)))
    assert (
        f"learning rate       {expected:g} suits the blocks and weights in a long run, and less in a short one" in out
    )


def test_preferences_want_a_tenth_of_the_rate(recipe: Path, tiny_model: Path, tmp_path: Path, diablo: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, DiabloConfig(num_blocks=4))
    pairs = [{"prompt": f"{n} and 3?", "chosen": f" {n + 3}", "rejected": f" {n}3"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = [f"data.train={tmp_path / 'pairs.jsonl'}", "training.max_steps=2"]
    slow = f"training.learning_rate={0.02 * suggested_learning_rate(adapted)}"
    for objective, share, is_slow in (("dpo", 0.1, False), ("orpo", 1, True)):
        expected = suggested_learning_rate(adapted, steps=2) * share
        command = ["train", recipe, *settings, f"objective={objective}"]
        status, out, error = diablo(*command, f"output={tmp_path / objective}")
        assert status == 0, error
        said = f"learning rate: {expected:.2g}, found in the weights for these blocks and 2 steps of {objective}"
        assert said in out + error
        status, out, error = diablo(*command, f"output={tmp_path / objective}-slow", slow)
        assert status == 0, error
        assert ("learns slowly" in out + error) == is_slow
        status, out, _ = diablo("plan", recipe, *settings, f"objective={objective}")
        assert f"learning rate       {suggested_learning_rate(adapted) * share:.2g} suits the blocks" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=lora"], "found auto, which is known for DiaBlo, and the method is lora; give a number, such as 2e-4"),
        (["training.optimizer=muon"], "known for AdamW, Lion and Adafactor, and the optimizer is muon; give a number"),
        (["training.optimizer=sgd"], "known for AdamW, Lion and Adafactor, and the optimizer is sgd; give a number"),
        (
            ["training.schedule=cosine", "training.min_learning_rate=1e-5"],
            "training.min_learning_rate has to be below it; give numbers for both",
        ),
        (["training.learning_rate=automatic"], "found 'automatic'; allowed: a number above 0"),
    ],
)
def test_where_no_rate_is_known_auto_is_refused(recipe: Path, diablo: Any, overrides: list[str], message: str) -> None:
    status, _, error = diablo("train", recipe, *overrides)
    assert status == 2
    assert message in error


def test_a_comparison_has_rates_of_its_own(recipe: Path, diablo: Any) -> None:
    status, _, error = diablo(
        "compare", recipe, "data.eval=2", "--methods", "diablo,lora", "--seeds", 1, "--lrs", "1e-3,2e-3", "--dry-run"
    )
    assert status == 0, error
