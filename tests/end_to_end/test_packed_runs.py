"""Runs on packed rows, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe of 24 rows of many lengths, 3 of them documents, that has no output yet."""
    text = "apples have more than dogs have, and Bob gave her the rest of them now"
    words = text.split()
    lines = [{"prompt": f"How many {' '.join(words[: n % 13])}?", "completion": f" x = {n} + 4"} for n in range(21)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = [{"text": " ".join(words[n:])} for n in range(3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\n"
        f"data: {{train: [{tmp_path / 'rows.jsonl'}, {tmp_path / 'texts.jsonl'}], eval: {tmp_path / 'rows.jsonl'}}}\n"
        "method: {name: diablo, num_blocks: 4}\n"
        "training: {learning_rate: 0.01, batch_size: 4, max_length: 128, epochs: 2, logging_steps: 1, packing: true}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


def blocks_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_step_on_packed_rows_is_the_step_on_the_same_rows_apart(diablo, recipe, tmp_path, attention):
    runs = {}
    for name, packing in (("packed", "true"), ("apart", "false")):
        overrides = [f"training.packing={packing}", "training.batch_size=64", f"output={tmp_path / name}"]
        assert diablo("train", recipe, f"attention={attention}", *overrides)[0] == 0
        runs[name] = json.loads((tmp_path / name / "run.json").read_text())
    packed, apart = runs["packed"], runs["apart"]
    # Every row is in every step of either.
    assert packed["training"]["steps"] == apart["training"]["steps"] == 2
    assert packed["data"]["sequences"] < packed["data"]["rows"] == apart["data"]["sequences"] == 24
    for (_, loss), (_, loss_apart) in zip(packed["training"]["loss"], apart["training"]["loss"], strict=True):
        assert loss == pytest.approx(loss_apart, abs=1e-5)
    assert packed["training"]["held_out_loss"][-1][1] == pytest.approx(
        apart["training"]["held_out_loss"][-1][1], abs=1e-5
    )
    before = blocks_of(tmp_path / "apart")
    for name, values in blocks_of(tmp_path / "packed").items():
        torch.testing.assert_close(values, before[name], rtol=1e-3, atol=1e-5)


def test_the_plan_says_what_a_step_is_of(diablo, recipe):
    status, out, _ = diablo("train", recipe, "--dry-run")
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("packing"))
    sequences = int(line.split("into ")[1].split()[0])
    assert f"into {sequences} sequences of up to " in line
    assert f"{24 / sequences:.1f} rows in each" in line
    assert f"effective batch     4 sequences, about {4 * 24 / sequences:.0f} rows" in out


def test_a_resumed_run_on_packed_rows_ends_with_the_same_adapter_to_the_bit(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", recipe, "training.save_steps=1", "training.batch_size=2", "training.save_total_limit=9"]
    assert diablo(*arguments)[0] == 0
    undisturbed = blocks_of(run)
    steps = json.loads((run / "run.json").read_text())["training"]["steps"]
    shutil.rmtree(run / "adapter")
    for step in range(2, steps + 1):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}")
    (run / "run.json").unlink()
    status, _, err = diablo(*arguments, "training.packing=false", "--resume")
    assert status == 2
    assert "training.packing: changed since the run that is to be resumed" in err
    assert diablo(*arguments, "--resume")[0] == 0
    assert all(torch.equal(values, undisturbed[name]) for name, values in blocks_of(run).items())


def test_a_prompt_that_is_trained_is_not_packed(diablo, recipe, tmp_path):
    method = "method={name: peft, type: PROMPT_TUNING, num_virtual_tokens: 4}"
    status, _, err = diablo("train", recipe, method)
    assert status == 2
    assert "training.packing: found true with PROMPT_TUNING" in err
    assert not (tmp_path / "run").exists()
