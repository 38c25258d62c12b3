"""Training that goes on from an adapter, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

ROWS = [{"prompt": f"How many are {n} and {n % 5}?", "completion": f" x = {n} + {n % 5}"} for n in range(24)]


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe without a method and an output, whose held-out rows are those that it trains on."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {tmp_path / 'rows.jsonl'}, eval: {tmp_path / 'rows.jsonl'}}}\n"
        "training: {learning_rate: 0.02, batch_size: 8, epochs: 2, logging_steps: 1}\nprecision: fp32\n"
    )
    return path


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "method",
    [
        "{name: diablo, num_blocks: 4, block_pattern: {q_proj: 8}, target_modules: [q_proj, up_proj], dropout: 0.1}",
        "{name: lora, r: 4, target_modules: [q_proj, v_proj]}",
        "{name: pissa, r: 4}",
        "{name: peft, type: DIABLO, num_blocks: 4, modules_to_save: [norm]}",
        "{name: peft, type: VERA, r: 4, target_modules: [q_proj]}",
    ],
)
def test_training_goes_on_where_the_adapter_has_ended(diablo, recipe, tmp_path, method):
    first, second = tmp_path / "first", tmp_path / "second"
    assert diablo("train", recipe, f"method={method}", f"output={first}")[0] == 0
    status, out, _ = diablo("train", recipe, f"adapter={first}", f"output={second}", "--dry-run")
    assert status == 0
    assert f"goes on from        {first}" in out
    assert diablo("train", recipe, f"adapter={first}", f"output={second}")[0] == 0
    (_, untrained), *_, (_, ended) = record_of(first)["training"]["held_out_loss"]
    (_, started), *_, (_, further) = record_of(second)["training"]["held_out_loss"]
    assert started == pytest.approx(ended, abs=1e-4)
    assert untrained > ended > further
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert any(not torch.equal(values, after[name]) for name, values in before.items())
    assert diablo("generate", second, "How many are 3 and 3?", "--max-new-tokens", 2)[0] == 0


def test_a_checkpoint_is_an_adapter_to_go_on_from_too(diablo, recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    method = "method={num_blocks: 4}"
    assert diablo("train", recipe, method, f"output={first}", "training.save_steps=2", "training.max_steps=4")[0] == 0
    checkpoint = first / "checkpoints" / "checkpoint-2"
    # So small a rate leaves the values as they are.
    settings = [f"output={second}", "training.learning_rate=1e-30", "training.max_steps=1"]
    assert diablo("train", recipe, f"adapter={checkpoint}", *settings)[0] == 0
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all(torch.equal(values, saved[name]) for name, values in weights(second).items())
    assert any(bool(values.any()) for values in saved.values())


def test_a_run_that_has_gone_on_is_resumed_to_the_same_to_the_bit(diablo, recipe, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert diablo("train", recipe, "method={num_blocks: 4, dropout: 0.1}", f"output={first}")[0] == 0
    arguments = ["train", recipe, f"adapter={first}", f"output={second}", "training.save_steps=2"]
    assert diablo(*arguments)[0] == 0
    undisturbed = weights(second)
    (second / "run.json").unlink()
    shutil.rmtree(second / "adapter")
    shutil.rmtree(second / "checkpoints" / "checkpoint-6")
    # The recipe that the run has saved names the method beside the adapter.
    assert diablo("train", second / "recipe.yaml", "--resume")[0] == 0
    assert all(torch.equal(values, undisturbed[name]) for name, values in weights(second).items())


@pytest.fixture
def first(diablo, recipe, tmp_path) -> Path:
    run = tmp_path / "first"
    settings = ["method={num_blocks: 4}", f"output={run}", "training.max_steps=2"]
    assert diablo("train", recipe, *settings)[0] == 0
    return run


def test_what_does_not_fit_the_adapter_is_refused_before_the_model_is_loaded(diablo, recipe, tmp_path, first):
    def refused(*overrides: str) -> str:
        status, _, err = diablo("train", recipe, *overrides)
        assert status == 2
        assert len(err.strip().splitlines()) == 1
        return err

    second = f"output={tmp_path / 'second'}"
    own = refused(f"adapter={first}", second, "method.num_blocks=2")
    assert f"method: found diablo with settings of its own, and adapter '{first}' is trained as it is" in own
    assert f"adapter: '{tmp_path}' has no adapter_config.json" in refused(f"adapter={tmp_path}", second)
    assert "adapter: there is no folder 'me/adapter'; give a run" in refused("adapter=me/adapter", second)
    assert f"holds '{first}', which adapter names" in refused(f"adapter={first}", f"output={first}")
    (tmp_path / "whole" / "model").mkdir(parents=True)
    whole = refused(f"adapter={tmp_path / 'whole'}", second)
    assert f"is a run that has trained the whole model; give model: {tmp_path / 'whole' / 'model'}" in whole
    tensors = weights(first)
    tensors.popitem()
    save_file(tensors, first / "adapter" / "adapter_model.safetensors")
    assert "missing, none too many" in refused(f"adapter={first}", second)
    assert not (tmp_path / "second").exists()


def test_rows_that_are_put_otherwise_than_those_of_the_adapter_are_told(diablo, recipe, tmp_path):
    first, second = tmp_path / "first", f"output={tmp_path / 'second'}"
    template = tmp_path / "own.jinja"
    template.write_text("{% for message in messages %}<s>{{ message['content'] }}</s>\n{% endfor %}")
    chatting = ["chat=true", f"chat_template={template}", "training.max_steps=2"]
    assert (
        diablo("train", recipe, "method={num_blocks: 4}", *chatting, f"output={first}", "training.save_steps=2")[0] == 0
    )
    for adapter in (first, first / "adapter", first / "checkpoints" / "checkpoint-2"):
        _, out, _ = diablo("train", recipe, f"adapter={adapter}", second, "--dry-run")
        assert f"prompts             {adapter} was trained with chat: true, a chat_template of its own" in out
    _, out, _ = diablo("train", recipe, f"adapter={first}", second, *chatting, "--dry-run")
    assert "prompts  " not in out
    status, _, err = diablo("train", recipe, f"adapter={first}", second, "chat=true", "data.special_text=plain")
    assert status == 0
    assert f"adapter: {first} was trained with a chat_template of its own, data.special_text: keep, and this" in err
    assert "prompts             " in (tmp_path / "second" / "train.log").read_text()


def test_an_adapter_of_other_base_weights_is_refused(diablo, recipe, tmp_path, first):
    other = make_tiny_model(tmp_path / "other")
    path = other / "model.safetensors"
    tensors = load_file(path)
    save_file({name: values + 0.1 for name, values in tensors.items()}, path, metadata={"format": "pt"})
    status, _, err = diablo("train", recipe, f"adapter={first}", f"model={other}", f"output={tmp_path / 'second'}")
    assert status == 2
    assert "was made for base weights that differ at its targets from those of" in err
    status, _, err = diablo("compare", recipe, f"adapter={first}", f"output={tmp_path / 'second'}", "--dry-run")
    assert status == 2
    assert "adapter: in a comparison every method starts from the base model" in err
