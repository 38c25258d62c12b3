"""GRPO whose completions another engine generates: what it is handed in each step, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT
from safetensors.torch import load_file
from test_early_refusals import run as run_apart

from diablo.errors import UserError
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe

STAND_INS = ROOT / "tests" / "stand_ins"


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe that rewards a letter; its output is ``run`` beside it."""
    rows = [{"prompt": f"The dog {'asks ' * (n % 3)}{n}"} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rewards.py").write_text(
        "def letter(completions):\n    return [float('e' in text) for text in completions]\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {tmp_path / 'prompts.jsonl'}}}\n"
        "method: {name: diablo, num_blocks: 4}\n"
        f"objective: {{name: grpo, generations: 4, rewards: '{tmp_path / 'rewards.py'}:letter', max_new_tokens: 8,"
        " vllm: {}}\n"
        "training: {learning_rate: 0.03, batch_size: 8, max_steps: 4, logging_steps: 1}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


# One process for all runs: the libraries look for an engine once, when they are imported.
EACH_RUN = """
import json, os, sys
from diablo.recipes.reading import load_recipe
from diablo.training import train
recipe, *runs = sys.argv[1:]
for settings in map(json.loads, runs):
    recipe_of_run = load_recipe(recipe, settings)
    os.environ["STAND_IN_LOG"] = f"{recipe_of_run.output}.updates.jsonl"
    train(recipe_of_run)
"""


def test_an_engine_samples_from_the_model_that_is_trained_and_is_sent_no_more_than_the_adapted_weights(
    recipe, tmp_path
):
    runs = {name: [f"method={name}", f"output={tmp_path / name}"] for name in ("lora", "diablo")}
    runs["diablo"][0] = "method.num_blocks=4"
    done = subprocess.run(
        [sys.executable, "-c", EACH_RUN, str(recipe), *map(json.dumps, runs.values())],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{STAND_INS}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, settings in runs.items():
        check_run(recipe, tmp_path / name, settings)


def check_run(recipe: Path, run: Path, settings: list[str]) -> None:
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        # The engine's likelihood of each token over the trained model's own.
        assert line["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
        assert line["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)
    assert any(bool(values.any()) for values in load_file(run / "adapter/adapter_model.safetensors").values())
    updates = [json.loads(line) for line in Path(f"{run}.updates.jsonl").read_text().splitlines()]
    assert len(updates) == 4
    plan = make_plan(load_recipe(recipe, [*settings, "objective.vllm=null"]))
    weights = sum(kind.count * kind.shape[0] * kind.shape[1] for kind in plan.targets if kind.shape)
    assert [sum(update.values()) for update in updates] == [4 * weights] * 4
    assert not any("embed" in name or "norm" in name for name in updates[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.vllm={server: 'http://localhost:8000'}"], "objective.vllm.server: weights go from GPU to GPU"),
        (["quantization=nf4"], "objective.vllm: nf4 quantizes the weights"),
        (
            ["method={name: peft, type: lora, target_modules: [q_proj], modules_to_save: [input_layernorm]}"],
            r"objective.vllm: .* is trained, and vLLM is handed the weights of linear layers",
        ),
        (["method={name: peft, type: prompt_tuning, num_virtual_tokens: 4}"], "objective.vllm: found a section"),
    ],
)
def test_what_an_engine_cannot_be_handed_is_refused(recipe, monkeypatch, settings, message):
    monkeypatch.syspath_prepend(STAND_INS)
    with pytest.raises(UserError, match=message):
        make_plan(load_recipe(recipe, settings))


def test_an_engine_that_is_not_there_and_settings_that_contradict_are_refused_before_torch_is_imported(
    recipe, tmp_path
):
    contradicting = "objective.vllm={server: 'http://localhost:8000', gpu_memory: 0.5}"
    wanted = {
        (): "objective.vllm: vLLM is not installed",
        (contradicting,): "objective.vllm.gpu_memory: found 0.5 with a server",
        (
            "objective.vllm={server: localhost}",
        ): "found 'localhost'; give the whole address, such as http://localhost:8000",
    }
    outcomes = run_apart(tmp_path, [["train", "recipe.yaml", *settings] for settings in wanted])
    for expected, (status, error, heavy) in zip(wanted.values(), outcomes, strict=True):
        assert status == 2, error
        assert expected in error
        assert not heavy
