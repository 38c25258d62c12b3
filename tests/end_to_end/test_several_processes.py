"""One recipe in several processes: the same adapter as in one, saved once, and gone on with on another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diablo.errors import UserError
from diablo.recipe import load_recipe
from diablo.training import train

ROOT = Path(__file__).parents[2]


def write_recipe(tmp_path: Path, model: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntask: mawps\ndata: {{limit: 64}}\nmethod: {{name: diablo, num_blocks: 4}}\n"
        "training: {learning_rate: 1.0e-2, batch_size: 8, save_steps: 4, logging_steps: 1}\n"
        f"evaluation: {{limit: 4, before: false}}\nprecision: fp32\noutput: {tmp_path / 'one'}\n"
    )
    return recipe


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_two_processes_train_what_one_does_and_one_goes_on_where_they_stopped(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model)
    one = train(load_recipe(recipe)).record["training"]
    two = tmp_path / "two"
    done = launch("-m", "diablo_cli", "train", str(recipe), f"output={two}", "training.batch_size=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mawps accuracy after") == 1, "only the main process reports"
    record = json.loads((two / "run.json").read_text())["training"]
    assert (record["processes"], record["effective_batch"], record["steps"]) == (2, 8, 8)
    for mine, theirs in zip(one["loss"], record["loss"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for name, values in adapter_of(tmp_path / "one").items():
        torch.testing.assert_close(adapter_of(two)[name], values, rtol=0, atol=1e-5)

    # As if the two had been killed after their sixth step.
    (two / "run.json").unlink()
    (two / "checkpoints" / "checkpoint-8" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"found 4 and 1, which on 1 process come to 4 rows a step; .* had 8"):
        train(load_recipe(recipe, [f"output={two}", "training.batch_size=4"]), resume=True)
    resumed = train(load_recipe(recipe, [f"output={two}"]), resume=True).record["training"]
    assert (resumed["processes"], resumed["steps"]) == (1, 8)
    for name, values in adapter_of(tmp_path / "one").items():
        torch.testing.assert_close(adapter_of(two)[name], values, rtol=0, atol=1e-5)


def test_the_example_trains_on_a_model_that_is_spread_over_processes_what_one_process_does(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model)
    schedule = ["training.schedule=linear", "training.warmup_steps=2"]
    train(load_recipe(recipe, schedule))
    for shard, settings in (("tensor", schedule), ("fsdp", [*schedule, "training.batch_size=4"])):
        check_example(recipe, tmp_path, shard, [*settings, f"output={tmp_path / shard}"])


def check_example(recipe: Path, tmp_path: Path, shard: str, settings: list[str]) -> None:
    done = launch("examples/sharded_training.py", str(recipe), "--shard", shard, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[:-1]] == [f"step {n} of 8" for n in range(1, 9)]
    assert done.stdout.splitlines()[-1] == f"Wrote {tmp_path / shard / 'adapter'}."
    for name, values in adapter_of(tmp_path / "one").items():
        assert values.abs().max() > 0
        torch.testing.assert_close(adapter_of(tmp_path / shard)[name], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("variable", "engine"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_sharding_is_refused_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch, variable, engine):
    # On CPUs accelerate would silently shard nothing, and on GPUs a shard is not what is saved and scored.
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"accelerate was launched with {engine}, which shards the weights"):
        train(load_recipe(write_recipe(tmp_path, tiny_model)))
    assert not (tmp_path / "one").exists()
