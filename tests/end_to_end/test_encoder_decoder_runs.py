"""Encoder-decoders from the command line: trained, resumed, merged, asked and scored; and what is refused for them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM
from PIL import Image
from safetensors.torch import load_file
from tiny import make_tiny_t5
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    Florence2Config,
    T5Gemma2Config,
)

from diablo.errors import Interrupted
from diablo.recipes.reading import load_recipe
from diablo.training import safeguards, train

HELD_OUT = 8


def problem(n: int) -> dict[str, str]:
    first, second = n % 10, n // 10
    return {
        "prompt": f"Ann had {first} apples and Bob gave her {second} more.",
        "completion": f"x = {first} + {second}",
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["t5", "t5 with a gate"])
def t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random T5; not to be written to."""
    return make_tiny_t5(tmp_path_factory.mktemp("t5") / "model", gated=request.param)


@pytest.fixture
def recipe(t5: Path, tmp_path: Path) -> Path:
    rows = [problem(n) for n in range(40)]
    write(tmp_path / "rows.jsonl", rows[HELD_OUT:])
    write(tmp_path / "held_out.jsonl", rows[:HELD_OUT])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {t5}\ndata: {{train: {tmp_path / 'rows.jsonl'}, eval: {tmp_path / 'held_out.jsonl'}}}\n"
        "method: {num_blocks: 4}\nprecision: fp32\n"
        "training: {learning_rate: 0.02, batch_size: 8, epochs: 8, logging_steps: 1}\n"
        f"output: {tmp_path / 'run'}\nmerge: true\n"
    )
    return path


@torch.no_grad()
def loss_by_hand(model: Any, folder: Path, rows: list[dict[str, str]]) -> float:
    """transformers' own loss of one row at a time, for each token."""
    tokenizer, total, count = AutoTokenizer.from_pretrained(folder), 0.0, 0
    for row in rows:
        labels = tokenizer(text_target=row["completion"], return_tensors="pt").input_ids
        total += (
            model.eval()(**tokenizer(row["prompt"], return_tensors="pt"), labels=labels).loss.item() * labels.numel()
        )
        count += labels.numel()
    return total / count


def test_a_run_learns_and_its_held_out_loss_is_transformers_own(diablo, t5, recipe, tmp_path):
    status, out, err = diablo("train", recipe, "--dry-run")
    assert (status, "‹</s>›" in out) == (0, True), err
    # The pieces of SentencePiece are shown with the spaces between them.
    shown = [json.loads(line)["prompt"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sum(f" {prompt}</s>‹" in " ".join(out.split()) for prompt in shown) == 2
    status, _, err = diablo("train", recipe)
    assert status == 0, err
    run = tmp_path / "run"
    record, rows = json.loads((run / "run.json").read_text()), [problem(n) for n in range(HELD_OUT)]
    (_, before), (_, after) = record["training"]["held_out_loss"]
    assert before == pytest.approx(loss_by_hand(AutoModelForSeq2SeqLM.from_pretrained(t5), t5, rows), rel=1e-5)
    adapted = AutoPeftModelForSeq2SeqLM.from_pretrained(run / "adapter")
    assert after == pytest.approx(loss_by_hand(adapted, t5, rows), rel=1e-5)
    assert after < before / 2
    losses = [loss for _, loss in record["training"]["loss"]]
    assert losses[-1] < losses[0] / 2
    tokenizer = AutoTokenizer.from_pretrained(t5)
    texts = [(row["prompt"], row["completion"]) for row in map(problem, range(HELD_OUT, 40))]
    assert record["data"]["tokens"] == sum(len(tokenizer(text).input_ids) for row in texts for text in row)
    assert record["data"]["supervised_tokens"] == sum(len(tokenizer(text).input_ids) for _, text in texts)
    assert "AutoPeftModelForSeq2SeqLM" in (run / "adapter" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in (run / "merged" / "README.md").read_text()

    merged = AutoModelForSeq2SeqLM.from_pretrained(run / "merged")
    prompts = [problem(n)["prompt"] for n in (3, 17)]
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt")
        expected = tokenizer.decode(merged.generate(**asked, max_new_tokens=12)[0], skip_special_tokens=True)
        for model in (run, run / "merged"):
            status, out, err = diablo("generate", model, prompt, "--max-new-tokens", 12)
            assert (status, out.strip()) == (0, expected.strip()), err
    assert expected

    status, _, err = diablo("export", "ollama", run, tmp_path / "ollama")
    assert (status, "is an encoder-decoder, which Ollama does not run" in err) == (2, True)
    status, out, err = diablo("evaluate", run, "--task", "mawps", "--limit", 2, "--json")
    assert status == 0, err
    assert json.loads(out)["scores"]["mawps"]["total"] == 2
    status, out, err = diablo("plan", recipe)
    assert (status, "LoRA, r = " in out) == (0, True), err


@pytest.mark.parametrize("t5", [False], indirect=True)
@pytest.mark.parametrize("method", ["lora", "full", "{name: peft, type: PROMPT_TUNING, num_virtual_tokens: 4}"])
def test_other_methods_learn_from_the_same_recipe(diablo, recipe, tmp_path, method):
    arguments = [f"method={method}", "merge=false", "training.max_steps=4", "training.gradient_checkpointing=full"]
    status, _, err = diablo("train", recipe, *arguments)
    assert status == 0, err
    (_, before), (_, after) = json.loads((tmp_path / "run" / "run.json").read_text())["training"]["held_out_loss"]
    assert after < before
    status, _, err = diablo("generate", tmp_path / "run", "Ann had 3 apples.", "--max-new-tokens", 4)
    assert status == 0, err


@pytest.mark.parametrize("t5", [False], indirect=True)
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_adapter_to_the_bit(recipe, tmp_path, monkeypatch):
    settings = ["merge=false", "training.max_steps=8", "method.dropout=0.1"]

    def adapter() -> dict[str, torch.Tensor]:
        return load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")

    train(load_recipe(str(recipe), settings))
    undisturbed = adapter()
    end_of_step = safeguards.StopWhenAsked.on_step_end

    def ask_in_the_third_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        end_of_step(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(safeguards.StopWhenAsked, "on_step_end", ask_in_the_third_step)
        with pytest.raises(Interrupted, match="Stopped after step 3 of 8"):
            train(load_recipe(str(recipe), settings))
    train(load_recipe(str(tmp_path / "run" / "recipe.yaml"), []), resume=True)
    resumed = adapter()
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in resumed)


PAIRS = {"prompt": "a", "chosen": "b", "rejected": "c"}
CONVERSATION = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
REFUSED = {
    "a preference": ([PAIRS], ["objective=dpo"], "objective: found dpo, and ", "set sft."),
    "a head": (
        [{"text": "a", "label": label} for label in ("x", "y")],
        ["objective=classification"],
        "objective: found classification, and ",
        "set sft.",
    ),
    "rewards": (
        None,
        ["task=mawps", "data={limit: 8}", "objective={name: grpo, generations: 8, rewards: [right_answer]}"],
        "objective: found grpo, and ",
        "set sft.",
    ),
    "vectors": (
        [{"anchor": "a", "positive": "b"}],
        ["objective=embedding"],
        "objective: found embedding, and ",
        "set sft.",
    ),
    "packing": (None, ["training.packing=true"], "training.packing: found true, and ", "leave it out."),
    "noise": (
        None,
        ["training.neftune_noise_alpha=5"],
        "training.neftune_noise_alpha: found 5.0, and ",
        "leave it out.",
    ),
    "new tokens": (None, ["new_tokens=[<x>, <y>]"], "new_tokens: found <x>, <y>, and ", "leave it out."),
    "general text": (None, ["evaluation.general=builtin"], "evaluation.general: found builtin, and ", "leave it out."),
    "documents": ([{"text": "a b"}], [], "data: found a document (row 1) among the training rows, and ", "model."),
    "conversations": ([CONVERSATION], [], "Row 1 is a conversation, and the model's tokenizer has no ", "chat: true."),
    "no template": ([CONVERSATION], ["chat=true"], "chat: found true; the model's tokenizer has no chat template", ""),
}


@pytest.mark.parametrize("t5", [False], indirect=True)
@pytest.mark.parametrize(("rows", "settings", "begins", "ends"), REFUSED.values(), ids=REFUSED)
def test_what_an_encoder_decoder_cannot_do_is_refused_before_it_is_loaded(
    diablo, recipe, tmp_path, monkeypatch, rows, settings, begins, ends
):
    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", pytest.fail)
    if rows is not None:
        write(tmp_path / "rows.jsonl", rows * 4)
        settings = [*settings, "data.eval=null"]
    status, _, err = diablo("train", recipe, *settings)
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"error: {begins}")
    assert last.endswith(ends)


@pytest.mark.parametrize("t5", [False], indirect=True)
def test_rows_with_images_are_refused_since_an_encoder_decoder_sees_none(diablo, t5, recipe, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "a"}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": "b"}]
    write(tmp_path / "rows.jsonl", [{"messages": messages}] * 4)
    status, _, err = diablo("train", recipe, "data.eval=null")
    assert status == 2
    assert f"model: found '{t5}', which sees none, and 4 of 4 rows have images (row 1)" in err


@pytest.mark.parametrize("t5", [False], indirect=True)
@pytest.mark.parametrize(
    "seeing",
    [
        Florence2Config(architectures=["Florence2ForConditionalGeneration"]),
        T5Gemma2Config(architectures=["T5Gemma2ForConditionalGeneration"]),
    ],
    ids=lambda config: config.model_type,
)
def test_an_encoder_decoder_that_sees_images_is_neither_trained_nor_asked(diablo, recipe, tmp_path, seeing):
    seeing.save_pretrained(tmp_path / "seeing")
    for verb in (("train", recipe, f"model={tmp_path / 'seeing'}"), ("plan", tmp_path / "seeing")):
        status, _, err = diablo(*verb)
        assert status == 2
        assert f"model: a {seeing.model_type!r} model is an encoder-decoder that sees images, and models of " in err
    status, _, err = diablo("generate", tmp_path / "seeing", "a")
    assert status == 2
    assert "is an encoder-decoder that sees images" in err


@pytest.mark.parametrize("t5", [False], indirect=True)
def test_an_encoder_decoder_is_not_quantized_by_blocks(diablo, t5, tmp_path):
    status, _, err = diablo("quantize", t5, tmp_path / "out", "--bits", 4)
    assert status == 2
    assert "is an encoder-decoder, whose blocks are in two lists; give a causal language model." in err


@pytest.mark.parametrize("t5", [False], indirect=True)
def test_rows_that_are_longer_than_learned_positions_are_left_out_and_counted(diablo, recipe, tmp_path, t5):
    tokenizer = AutoTokenizer.from_pretrained(t5)
    config = BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    rows = [{"prompt": "a " * 19, "completion": "b " * 19}, {"prompt": "a " * 60, "completion": "b"}]
    read, written = (len(tokenizer(rows[0][name]).input_ids) for name in ("prompt", "completion"))
    assert max(read, written) <= 40 < read + written
    write(tmp_path / "rows.jsonl", rows)
    settings = [f"model={tmp_path / 'bart'}", "data.eval=null", "training.max_steps=1"]
    status, _, err = diablo("train", recipe, *settings, "data.on_long=error")
    assert (status, ", and the model reads 40 tokens; 1 of 2 rows are longer" in err) == (2, True)
    status, _, err = diablo("train", recipe, *settings)
    assert status == 0, err
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (data["rows"], data["long_rows_dropped"]) == (1, [2])
