"""Runs that are killed, interrupted, out of disk or memory, or whose loss is not finite."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import run_python, start_python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from diablo.errors import UserError
from diablo.recipes.reading import load_recipe
from diablo.training import saving, train

HERE = Path(__file__).parent


def write_recipe(tmp_path: Path, model: Path, *overrides: str, rows: int = 32) -> list[str]:
    """A recipe with a checkpoint at every other step; returns the arguments of ``load_recipe``."""
    data = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"How many apples are {n} and {n % 7}?", "completion": f" x = {n} + {n % 7}"} for n in range(rows)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndata: {{train: {data}, eval: {data}}}\n"
        "method: {name: diablo, num_blocks: 4, dropout: 0.1}\n"
        "training: {learning_rate: 1.0e-2, batch_size: 4, save_steps: 2, logging_steps: 1}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return [str(recipe), *overrides]


def settings_of(arguments: list[str]):
    return load_recipe(arguments[0], arguments[1:])


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


KEEPING = (
    "eval_steps: 2, keep: best, early_stopping_patience: 2, ema: 0.5, schedule: constant, "
    "optimizer: {name: adamw_torch, groups: [{modules: [mlp], learning_rate: 0.1}]}"
)


@pytest.mark.parametrize(
    ("kills", "settings"),
    [
        (8, "schedule: linear"),
        pytest.param(30, "schedule: linear", marks=pytest.mark.slow),
        pytest.param(30, KEEPING, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_ends_with_the_same_adapter_to_the_bit(tiny_model, tmp_path, kills, settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ntask: mawps\ndata: {{limit: 32}}\n"
        "method: {name: diablo, num_blocks: 4, dropout: 0.1}\n"
        f"training: {{learning_rate: 1.0e-2, batch_size: 4, save_steps: 1, {settings}}}\nevaluation: {{limit: 4}}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = run_python(HERE / "kill_scenarios.py", recipe, kills, settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert sum(found["killed"].values()) == kills
    assert found["ends"] >= 1
    assert len(found["killed"]) >= 2, "all kills came at the same kind of moment"


@pytest.mark.parametrize("damage", ["truncated", "changed", "file missing", "manifest missing", "manifest cut"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(tiny_model, tmp_path, damage, capsys):
    arguments = write_recipe(tmp_path, tiny_model)
    train(settings_of(arguments))
    run = tmp_path / "run"
    undisturbed = adapter_of(run)
    (run / "run.json").unlink()
    last = run / "checkpoints" / "checkpoint-8"
    optimizer, manifest = last / "optimizer.pt", last / "manifest.json"
    content = optimizer.read_bytes()
    if damage == "truncated":
        optimizer.write_bytes(content[:-10])
    elif damage == "changed":
        optimizer.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    elif damage == "file missing":
        optimizer.unlink()
    elif damage == "manifest missing":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:-20])
    capsys.readouterr()
    train(settings_of(arguments), resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-8 is not whole" in said
    assert ("optimizer.pt" in said) == ("manifest" not in damage)
    assert_same(adapter_of(run), undisturbed)


def test_where_no_checkpoint_is_whole_that_is_said(tiny_model, tmp_path):
    arguments = write_recipe(tmp_path, tiny_model)
    train(settings_of(arguments))
    (tmp_path / "run" / "run.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(settings_of(arguments), resume=True)
    with pytest.raises(UserError, match="--overwrite"):
        train(settings_of(arguments))
    train(settings_of(arguments), overwrite=True)


def test_old_checkpoints_are_deleted_and_nothing_else_is_left(tiny_model, tmp_path):
    train(settings_of(write_recipe(tmp_path, tiny_model, "training.save_total_limit=2")))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names - {"README.md"} == {"checkpoint-6", "checkpoint-8"}


def test_a_full_disk_leaves_the_checkpoint_before_intact(tiny_model, tmp_path):
    arguments = write_recipe(tmp_path, tiny_model)
    script = f"""
import resource, sys
import diablo.training.saving as saving
from diablo.errors import UserError
from diablo.recipes.reading import load_recipe
from diablo.training import train
publish = saving.publish
def publish_and_fill(*given):
    found = publish(*given)
    if found[0].name == "checkpoint-4":
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    return found
saving.publish = publish_and_fill
try:
    train(load_recipe({arguments[0]!r}))
except UserError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print("refused:", error)
"""
    done = run_python("-c", script)
    assert "The checkpoint of step 6 cannot be written" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "Checkpoint-4 is intact: make room and go on with --resume." in done.stdout
    last, torn = saving.last_whole(tmp_path / "run" / "checkpoints")
    assert last.name == "checkpoint-4"
    assert torn == {}
    assert not (tmp_path / "run" / "checkpoints" / saving.STAGING).exists()
    train(settings_of(arguments), resume=True)
    resumed = adapter_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    train(settings_of(arguments))
    assert_same(adapter_of(tmp_path / "run"), resumed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_to_stop_gets_a_checkpoint_and_the_line_to_go_on_with(tiny_model, tmp_path, number):
    arguments = write_recipe(tmp_path, tiny_model, "training.save_steps=null", "training.epochs=200")
    process = start_python("-m", "diablo", "train", *arguments, settings={"OMP_NUM_THREADS": "1"})
    try:
        # The loss is logged at each step, but only a terminal's bar shows it: what shows here is the log of the run.
        log, deadline = tmp_path / "run" / "train.log", time.monotonic() + 120
        while not (log.is_file() and "step 2 of" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate()[1]
    finally:
        process.kill()
    assert process.returncode == 128 + number, said[-2000:]
    assert "Traceback" not in said
    line = next(line for line in said.splitlines() if line.startswith("Stopped after step"))
    step = int(line.split()[3])
    assert line.endswith(f"Go on with: diablo train {tmp_path / 'run' / 'recipe.yaml'} --resume")
    last, _ = saving.last_whole(tmp_path / "run" / "checkpoints")
    assert last.name == f"checkpoint-{step}"
    assert log.read_text().splitlines()[-1].endswith(line)


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_adapter(tiny_model, tmp_path, monkeypatch):
    from diablo.errors import Interrupted
    from diablo.training import safeguards

    arguments = write_recipe(tmp_path, tiny_model, "training.save_steps=null")
    train(settings_of(arguments))
    undisturbed = adapter_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    end_of_step = safeguards.StopWhenAsked.on_step_end
    # A shell that starts a job in the background has it ignored.
    before = signal.getsignal(signal.SIGINT)

    def ask_in_the_third_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        end_of_step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(safeguards.StopWhenAsked, "on_step_end", ask_in_the_third_step)
        with pytest.raises(Interrupted, match="Stopped after step 3 of 8"):
            train(settings_of(arguments))
    assert signal.getsignal(signal.SIGINT) is before
    train(settings_of([str(tmp_path / "run" / "recipe.yaml")]), resume=True)
    assert_same(adapter_of(tmp_path / "run"), undisturbed)


def spoiled_model(tiny_model: Path, folder: Path, spoil) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        spoil(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    return folder


def spoil_a_token(model: LlamaForCausalLM) -> None:
    """Whoever reads a ``!`` computes with an infinite embedding."""
    model.get_input_embeddings().weight[token_of("!", model)] = torch.inf


def token_of(text: str, model: LlamaForCausalLM) -> int:
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(model.config._name_or_path)(text, add_special_tokens=False)["input_ids"]
    return token


def with_bad_rows(tmp_path: Path, model: Path, bad: set[int], *overrides: str) -> list[str]:
    arguments = write_recipe(tmp_path, model, *overrides)
    data = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number in bad:
        rows[number - 1]["prompt"] += "!"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = Path(arguments[0])
    recipe.write_text(recipe.read_text().replace(f", eval: {data}", ""))
    return arguments


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_rows_and_module(tiny_model, tmp_path):
    model = spoiled_model(tiny_model, tmp_path / "spoiled", spoil_a_token)
    # The row is as long as the others and stands in any batch.
    with pytest.raises(UserError, match=r"The loss is nan at step \d, on rows ") as caught:
        train(settings_of(with_bad_rows(tmp_path, model, {11})))
    message = str(caught.value)
    rows = [int(each) for each in message.partition("on rows ")[2].partition(";")[0].split(", ")]
    assert 11 in rows
    assert len(rows) == 4
    assert "the first module whose output is not finite is model.embed_tokens" in message
    assert "training.on_nonfinite=skip" in message
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_step_can_be_left_out_and_nothing_of_it_is_learned(tiny_model, tmp_path):
    model = spoiled_model(tiny_model, tmp_path / "spoiled", spoil_a_token)
    arguments = with_bad_rows(tmp_path, model, {11}, "training.on_nonfinite=skip", "training.schedule=constant")
    result = train(settings_of(arguments))
    (step,) = result.record["training"]["skipped_steps"]
    assert 1 <= step <= 8
    assert all(bool(torch.isfinite(values).all()) for values in adapter_of(tmp_path / "run").values())
    assert result.record["training"]["steps"] == 8
    # The optimizer did not count the step.
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert {int(each["step"]) for each in state["state"].values()} == {7}


def test_the_loss_that_is_logged_is_that_of_the_steps_that_were_made(tiny_model, tmp_path):
    model = spoiled_model(tiny_model, tmp_path / "spoiled", spoil_a_token)
    overrides = ["training.on_nonfinite=skip", "training.schedule=constant", "training.logging_steps=4"]
    record = train(settings_of(with_bad_rows(tmp_path, model, {11}, *overrides))).record["training"]
    assert [step for step, _ in record["loss"]] == [4, 8]
    # An untrained model of 320 tokens guesses: a step that counted with 0 would pull the mean down by a quarter.
    assert all(5.2 < loss < 6.2 for _, loss in record["loss"])


def test_steps_that_were_left_out_before_a_run_was_resumed_are_still_listed(tiny_model, tmp_path):
    model = spoiled_model(tiny_model, tmp_path / "spoiled", spoil_a_token)
    arguments = with_bad_rows(tmp_path, model, {11, 12}, "training.on_nonfinite=skip")
    skipped = train(settings_of(arguments)).record["training"]["skipped_steps"]
    undisturbed = adapter_of(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-8")
    assert train(settings_of(arguments), resume=True).record["training"]["skipped_steps"] == skipped
    assert_same(adapter_of(tmp_path / "run"), undisturbed)


def test_a_mixtures_loss_is_looked_after_too(tiny_model, tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        output_router_logits=True,
    )
    mixture = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        mixture.get_input_embeddings().weight[:] = torch.inf
    mixture.save_pretrained(tmp_path / "mixture")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "mixture")
    arguments = write_recipe(tmp_path, tmp_path / "mixture", "method.target_modules=[q_proj]")
    with pytest.raises(UserError, match="The loss is nan at step 1, on rows"):
        train(settings_of(arguments))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_run_that_was_killed_after_its_last_step_is_not_trained_further(tiny_model, tmp_path, schedule):
    # 6 steps are less than the epoch's 8.
    overrides = ["training.max_steps=6", f"training.schedule={schedule}"]
    arguments = write_recipe(tmp_path, tiny_model, *overrides)
    first = train(settings_of(arguments)).record["training"]
    undisturbed = adapter_of(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    shutil.rmtree(tmp_path / "run" / "adapter")
    resumed = train(settings_of(arguments), resume=True).record["training"]
    assert resumed["steps"] == 6
    assert resumed["loss"] == first["loss"]
    assert resumed["held_out_loss"] == first["held_out_loss"]
    assert_same(adapter_of(tmp_path / "run"), undisturbed)


def test_a_run_in_which_nothing_can_be_learned_is_stopped_all_the_same(tiny_model, tmp_path):
    model = spoiled_model(tiny_model, tmp_path / "spoiled", spoil_a_token)
    arguments = with_bad_rows(
        tmp_path,
        model,
        set(range(1, 33)),
        "training.on_nonfinite=skip",
        "training.epochs=3",
        "training.save_steps=null",
    )
    with pytest.raises(UserError, match="The loss is nan at step 11,"):
        train(settings_of(arguments))


def test_weights_that_training_itself_has_spoiled_are_named(tiny_model, tmp_path):
    arguments = write_recipe(tmp_path, tiny_model, "training.learning_rate=1.0e38", "training.on_nonfinite=skip")
    with pytest.raises(UserError, match=r"The loss is (nan|inf) at step \d.* (no longer|not) finite"):
        train(settings_of(arguments))


def test_memory_that_runs_out_says_what_to_lower(tiny_model, tmp_path, monkeypatch):
    forward = LlamaForCausalLM.forward
    calls = []

    def forward_out_of_memory(self, *args, **kwargs):
        calls.append(1)
        if self.training and len(calls) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward_out_of_memory)
    with pytest.raises(
        UserError, match=r"Out of memory in training with 4 rows of up to \d+ tokens at a time: lower"
    ) as caught:
        train(settings_of(write_recipe(tmp_path, tiny_model, "training.epochs=4")))
    for name in ("batch_size", "gradient_accumulation", "gradient_checkpointing", "max_length", "quantization"):
        assert name in str(caught.value)
    assert "set training.gradient_checkpointing=selective" in str(caught.value)
    calls.clear()
    overrides = [
        "training.epochs=4",
        "training.gradient_checkpointing=selective",
        "output=" + str(tmp_path / "selective"),
    ]
    with pytest.raises(UserError, match=r"set training\.gradient_checkpointing=full"):
        train(settings_of(write_recipe(tmp_path, tiny_model, *overrides)))
    calls.clear()
    overrides = ["training.batch_size=1", "training.gradient_checkpointing=full", "output=" + str(tmp_path / "other")]
    with pytest.raises(UserError, match=r"Out of memory in training with 1 row of up to") as caught:
        train(settings_of(write_recipe(tmp_path, tiny_model, *overrides)))
    assert "batch_size" not in str(caught.value)
    assert "gradient_checkpointing" not in str(caught.value)
