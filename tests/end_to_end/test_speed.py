"""The switches of a recipe's section ``speed``: that they change what a step costs, and not what is learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_several_processes import launch
from torch._dynamo.utils import counters

from diablo.errors import UserError
from diablo.models.ready import load_for_generation
from diablo.planning.making import make_plan
from diablo.recipes.reading import load_recipe
from diablo.training import train
from diablo.training.engines import check_shardable


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe of eight steps, whose batches have eight lengths, with rows to measure and a checkpoint."""
    for name, count in (("train", 32), ("eval", 4)):
        rows = [{"prompt": "apple " * (1 + number // 4), "completion": f" x = {number}"} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {tmp_path / 'train.jsonl'}, eval: {tmp_path / 'eval.jsonl'}}}\n"
        "method: {name: diablo, num_blocks: 4}\nprecision: fp32\n"
        "training: {learning_rate: 1.0e-2, batch_size: 4, logging_steps: 1, eval_steps: 4, save_steps: 4}\n"
        f"output: {tmp_path / 'run'}\n"
    )
    return path


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_nearly_the_same(run: Path, other: Path) -> None:
    found, expected = adapter_of(run), adapter_of(other)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert values.abs().max() > 1e-3
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-4)


def test_a_compiled_run_learns_the_same_and_compiles_once_for_all_lengths(diablo: Any, recipe: Path, tmp_path: Path):
    torch._dynamo.reset()
    counters.clear()
    plain, run = tmp_path / "plain", tmp_path / "run"
    train(load_recipe(recipe, [f"output={plain}"]))
    assert not counters["frames"], "nothing is compiled where nobody asks for it"
    status, _, error = diablo("train", recipe, "speed.compile=true")
    assert status == 0, error
    # The first layer's inputs need no gradient; the others' do; held-out losses have none. And the trial at the start.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    assert_nearly_the_same(run, plain)
    record, expected = (json.loads((folder / "run.json").read_text())["training"] for folder in (run, plain))
    for key in ("loss", "held_out_loss"):
        for found, wanted in zip(record[key], expected[key], strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)

    # It goes on as it would have, and what generates afterwards is an ordinary model.
    before = adapter_of(run)
    (run / "run.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    status, _, error = diablo("train", recipe, "speed.compile=true", "--resume")
    assert status == 0, error
    assert all(torch.equal(values, before[name]) for name, values in adapter_of(run).items())
    status, _, error = diablo("generate", run, "apple apple", "--max-new-tokens", 3)
    assert status == 0, error
    model, _ = load_for_generation(str(run))
    assert not any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["method=lora", "training.gradient_checkpointing=full"])
def test_other_methods_and_checkpointing_compile_too(recipe: Path, tmp_path: Path, setting: str):
    settings = [setting, "training.max_steps=2", "training.eval_steps=null", "training.save_steps=null"]
    train(load_recipe(recipe, [*settings, f"output={tmp_path / 'plain'}"]))
    torch._dynamo.reset()
    counters.clear()
    train(load_recipe(recipe, [*settings, "speed.compile=true"]))
    assert 2 <= counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]
    found, expected = adapter_of(tmp_path / "run"), adapter_of(tmp_path / "plain")
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_several_processes_compile(recipe: Path, tmp_path: Path):
    train(load_recipe(recipe, [f"output={tmp_path / 'one'}"]))
    two = tmp_path / "two"
    settings = ["training.batch_size=2", "speed.compile=true", f"output={two}"]
    done = launch("-m", "diablo_cli", "train", str(recipe), *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_nearly_the_same(two, tmp_path / "one")


def refusal(recipe: Path, *overrides: str) -> str:
    """The one line that a recipe is refused with, before anything is loaded."""
    with pytest.raises(UserError) as caught:
        make_plan(load_recipe(recipe, overrides))
    (line,) = str(caught.value).splitlines()
    return line


def test_compiling_without_a_compiler_is_refused_with_what_is_missing(recipe: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        torch._dynamo.reset()
        line = refusal(recipe, "speed.compile=true")
    assert line.startswith("speed.compile: found true, and torch.compile makes no code for a CPU here (")
    assert "no-such-compiler" in line
    assert line.endswith("install what it misses, such as a C++ compiler, or leave it out.")


NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["speed.compile=maybe"], ["speed.compile: found 'maybe'; allowed: true or false"]),
        (["speed.compiled=true"], ["speed.compiled: unknown key; allowed: compile, liger", "Did you mean compile?"]),
        (
            ["speed.compile=true", "training.gradient_checkpointing=selective"],
            ["speed.compile: found true with training.gradient_checkpointing: selective", "set none, or full"],
        ),
        pytest.param(["speed.liger=true"], ["speed.liger: found true; Liger's kernels are for GPUs"], marks=NO_GPU),
        pytest.param(
            ["speed.activation_offloading=true"],
            ["speed.activation_offloading: found true", "a CPU computes in the machine's own"],
            marks=NO_GPU,
        ),
        pytest.param(
            ["attention=flash_attention_2", "precision=bf16"],
            ["attention: found flash_attention_2, which trains on", "this is a CPU"],
            marks=NO_GPU,
        ),
        pytest.param(["attention=flex_attention"], ["attention: found flex_attention"], marks=NO_GPU),
        (["attention=flash"], ["attention: found 'flash'; allowed: auto, eager, sdpa, flash_attention_2"]),
        (["attention=paged|sdpa"], ["attention: found 'paged|sdpa', which pages the cache", "take 'sdpa'"]),
        (["attention=someone/flash-attn"], ["found 'someone/flash-attn'; allowed:", "kernels-community/flash-attn2"]),
    ],
)
def test_what_the_device_cannot_do_is_refused_on_the_command_line(
    diablo: Any, recipe: Path, tmp_path: Path, settings: list[str], parts: list[str]
):
    status, _, error = diablo("train", recipe, "--dry-run", *settings, columns=1000)
    assert status == 2
    (line,) = error.splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "run").exists()


def test_a_sharded_model_has_none_of_the_switches(recipe: Path):
    plan = make_plan(load_recipe(recipe, ["speed.compile=true"]))
    with pytest.raises(UserError, match=r"speed\.compile: found true, which is for a model that each process holds"):
        check_shardable(plan)
