"""One recipe in several processes: the same adapter as in one, saved once, and gone on with on another number."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from launching import ROOT, forked_python, run_python
from safetensors.torch import load_file

from diablo.errors import UserError
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe
from diablo.training import train
from diablo.training.engines import check_shardable


@pytest.fixture(autouse=True)
def environment_stays_as_it_was() -> Iterator[None]:
    """An engine tells accelerate about itself by variables, which are not for the tests that follow."""
    with patch.dict(os.environ):
        yield


def write_recipe(tmp_path: Path, model: Path, rows: int = 64, num_blocks: int = 4) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntask: mawps\ndata: {{limit: {rows}}}\nmethod: {{name: diablo, num_blocks: {num_blocks}}}\n"
        "training: {learning_rate: 1.0e-2, batch_size: 8, save_steps: 4, logging_steps: 1}\n"
        f"evaluation: {{limit: 4, before: false}}\nprecision: fp32\noutput: {tmp_path / 'one'}\n"
    )
    return recipe


def launch(
    *arguments: str, processes: int = 2, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_python(*arguments, processes=processes, settings={"OMP_NUM_THREADS": "1"} | (settings or {}))


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes as a user starts them."""
    command = [forked_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_two_processes_train_what_one_does_and_one_goes_on_where_they_stopped(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model)
    one = train(load_recipe(recipe)).record["training"]
    two = tmp_path / "two"
    done = torchrun("-m", "diablo_cli", "train", str(recipe), f"output={two}", "training.batch_size=4")
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


@pytest.mark.parametrize("objective", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_two_processes_prefer_what_one_does_to_the_same_reference(tiny_model, tmp_path, objective):
    rows = [{"prompt": f"How many {n}?", "chosen": f" x = {n}", "rejected": f" dogs {n}."} for n in range(18)]
    if objective == "kto":
        sides = ("chosen", "rejected")
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in sides
        ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\nobjective: {objective}\ndata: {{train: {tmp_path / 'rows.jsonl'}, eval: 3, limit: 12}}\n"
        "method: {name: diablo, num_blocks: 4}\nprecision: fp32\n"
        # Adam's step is as large for a gradient that is nothing but rounding.
        "training: {optimizer: sgd, learning_rate: 1, batch_size: 6, max_steps: 4, logging_steps: 1}\n"
        f"output: {tmp_path / 'one'}\n"
    )
    one = train(load_recipe(recipe)).record["training"]
    two = tmp_path / "two"
    done = launch("-m", "diablo_cli", "train", str(recipe), f"output={two}", "training.batch_size=3")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((two / "run.json").read_text())["training"]
    assert (record["processes"], record["effective_batch"]) == (2, 6)
    assert one["loss"][-1][1] < one["loss"][0][1] - 0.001
    for (_, mine), (_, theirs) in zip(one["loss"], record["loss"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
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


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
SHARDED = {
    "fsdp": FSDP,
    "zero-2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero-3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="DeepSpeed is not installed, or has no compiler for what it builds on CPUs",
)


@pytest.mark.parametrize(
    ("engine", "other"),
    [
        ("fsdp", "fsdp"),
        pytest.param("zero-2", "zero-3", marks=NEEDS_DEEPSPEED),
        pytest.param("zero-3", "zero-2", marks=[NEEDS_DEEPSPEED, pytest.mark.slow]),
    ],
)
def test_a_sharded_run_trains_what_one_process_does_and_is_gone_on_with_by_any(tiny_model, tmp_path, engine, other):
    # Blocks whose number the processes do not divide, and steps of two forwards.
    recipe = write_recipe(tmp_path, tiny_model, rows=60, num_blocks=5)
    one_settings = ["training.batch_size=6"]
    one = train(load_recipe(recipe, one_settings))
    two = tmp_path / "two"
    overrides = ["training.batch_size=1", "training.gradient_accumulation=2", f"output={two}"]
    # Layers are computed again while what FSDP gathers comes and goes.
    overrides += ["training.gradient_checkpointing=selective"] if engine == "fsdp" else []
    command = ["tests/end_to_end/sharding_cpus.py", "train", str(recipe)]
    done = launch(*command, *overrides, "evaluation.before=true", settings=SHARDED[engine], processes=3)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((two / "run.json").read_text())
    assert record["training"]["engine"] == ("FSDP" if engine == "fsdp" else "DEEPSPEED")
    assert record["parameters"] == one.record["parameters"]
    kept = record["training"]["parameters_kept"] / record["parameters"]["total"]
    assert kept == 1 if engine == "zero-2" else 0.3 < kept < 0.45, kept
    assert record["scores"]["before"]["mawps"]["total"] == 4
    for mine, theirs in zip(one.record["training"]["loss"], record["training"]["loss"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    for name, values in adapter_of(tmp_path / "one").items():
        assert values.abs().max() > 0
        torch.testing.assert_close(adapter_of(two)[name], values, rtol=0, atol=1e-5)

    # As if it had been killed in its last step, gone on with by another engine, and by one process.
    stopped = adapter_of(two)
    for folder in (tmp_path / "other", tmp_path / "alone"):
        shutil.copytree(two, folder)
        (folder / "run.json").unlink()
        shutil.rmtree(folder / "checkpoints" / "checkpoint-10")
    resumed = ["training.batch_size=3", f"output={tmp_path / 'other'}", "--resume"]
    done = launch(*command, *resumed, settings=SHARDED[other])
    assert done.returncode == 0, done.stderr[-3000:]
    train(load_recipe(recipe, [*one_settings, f"output={tmp_path / 'alone'}"]), resume=True)
    for name, values in stopped.items():
        torch.testing.assert_close(adapter_of(tmp_path / "other")[name], values, rtol=0, atol=1e-5)
        torch.testing.assert_close(adapter_of(tmp_path / "alone")[name], values, rtol=0, atol=1e-5)


def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, tiny_model)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    # One process: accelerate would silently shard nothing.
    with pytest.raises(UserError, match="launched with FSDP, with which it shards over two or more GPUs"):
        train(load_recipe(recipe))
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="launched with FSDP 1, which cannot hold frozen weights beside trained ones"):
        train(load_recipe(recipe))
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match=r"offload_param_device: cpu, as examples/accelerate_offload\.yaml does"):
        train(load_recipe(recipe))
    assert not (tmp_path / "one").exists()


@NEEDS_DEEPSPEED
@pytest.mark.slow
def test_frozen_weights_that_zero_3_offloads_train_the_same(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model)
    train(load_recipe(recipe, ["training.save_steps=null"]))
    offloaded = SHARDED["zero-3"] | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    done = launch(
        "-m", "diablo_cli", "train", str(recipe), f"output={tmp_path / 'two'}", processes=1, settings=offloaded
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, values in adapter_of(tmp_path / "one").items():
        torch.testing.assert_close(adapter_of(tmp_path / "two")[name], values, rtol=0, atol=1e-5)


def test_deepspeed_that_is_not_installed_names_the_extra(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("diablo.training.engines.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; install it with: pip install 'diablo-peft\[deepspeed\]'"):
        train(load_recipe(write_recipe(tmp_path, tiny_model)))


@pytest.mark.parametrize(
    ("written", "setting", "message"),
    [
        (
            "{name: diablo, num_blocks: 4}",
            "{name: full}",
            "method.name: found full, which changes the weights themselves",
        ),
        ("{name: diablo, num_blocks: 4}", "{name: pissa}", "method.name: found pissa"),
        ("precision: fp32", "quantization: nf4", "quantized weights, which cannot be sharded"),
        (
            "precision: fp32",
            "precision: bf16",
            "precision: found bf16 or fp16, and on CPUs a sharded model is trained in",
        ),
    ],
)
def test_a_recipe_that_cannot_be_sharded_is_refused(tiny_model, tmp_path, written, setting, message):
    recipe = write_recipe(tmp_path, tiny_model)
    recipe.write_text(recipe.read_text().replace(written, setting))
    with pytest.raises(UserError, match=message):
        check_shardable(make_plan(load_recipe(recipe)))


def test_selective_checkpointing_is_refused_under_zero_3_alone(tiny_model, tmp_path, monkeypatch):
    plan = make_plan(load_recipe(write_recipe(tmp_path, tiny_model), ["training.gradient_checkpointing=selective"]))
    check_shardable(plan)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("diablo.training.engines.find_spec", lambda name: object())
    for stage in (2, 3):
        monkeypatch.setattr("diablo.training.engines.DeepSpeedPlugin", lambda n=stage: SimpleNamespace(zero_stage=n))
        with (
            pytest.raises(UserError, match=r"found selective under ZeRO-3, .*: set full")
            if stage == 3
            else nullcontext()
        ):
            check_shardable(plan)


@NEEDS_DEEPSPEED
@pytest.mark.slow
def test_deepspeed_that_shards_nothing_is_refused(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model)
    settings = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    done = launch("-m", "diablo_cli", "train", str(recipe), "training.batch_size=4", settings=settings)
    assert done.returncode != 0
    assert "which is none of ZeRO-2 or ZeRO-3: set zero_stage to 2 or 3" in done.stderr
    assert not (tmp_path / "one" / "run.json").exists()
