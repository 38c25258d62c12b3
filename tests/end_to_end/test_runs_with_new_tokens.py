"""Texts that become tokens of their own (``new_tokens``), from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo.models.loading import load_model
from diablo.models.vocabulary import add_tokens, give_rows
from diablo.recipes.reading import load_recipe
from diablo.training import train

ROWS = [
    {"prompt": f"How many are {n} and {n % 5}?", "completion": f"<think>{n} + {n % 5}</think> x = {n + n % 5}"}
    for n in range(24)
]
NEW = ["<think>", "</think>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS_IN_FILE = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_IN_FILE = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
KINDS = {"untied": {}, "tied": {"tied": True}, "spare": {"spare_rows": 5}, "one spare": {"tied": True, "spare_rows": 1}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_model(folder / kind, **settings) for kind, settings in KINDS.items()}


def write_recipe(folder: Path, model: Path, *more: str) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {model}\ndata: {{train: {folder / 'rows.jsonl'}, eval: {folder / 'rows.jsonl'}}}\n"
        'new_tokens: ["<think>", {text: "</think>", special: true}]\n'
        "training: {learning_rate: 0.02, batch_size: 8, epochs: 2, logging_steps: 1}\nprecision: fp32\n"
        "method: {num_blocks: 4}\n" + "\n".join(more)
    )
    return path


@pytest.fixture
def recipe(models, tmp_path) -> Path:
    return write_recipe(tmp_path, models["untied"])


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind of model."""
    found = {}
    for kind, model in models.items():
        folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        train(load_recipe(write_recipe(folder, model), [f"output={folder / 'run'}"]))
        found[kind] = folder / "run"
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def base_weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def test_the_dry_run_says_where_rows_are_and_what_is_never_trained(diablo, models, recipe):
    status, out, _ = diablo("train", recipe, 'new_tokens=["<think>", "<|tool|>"]', "output=runs/x", "--dry-run")
    assert status == 0
    assert (
        "trained tokens      <think> 24 x, <|tool|> 0 x in the training rows; the embedding grows from 320 to 322"
        in out
    )
    assert "never trained       <|tool|> occurs in no training row" in out
    assert "‹<think>›" in out
    for kind, words in {
        "spare": "in spare rows of the embedding, which keeps its 325",
        "one spare": "1 in spare rows of the embedding, and the embedding grows from 321 to 322 rows",
    }.items():
        assert words in diablo("plan", recipe, f"model={models[kind]}", "output=runs/x")[1]
    status, out, _ = diablo("train", recipe, "output=runs/x", "--dry-run", "--json")
    record = json.loads(out)["trained_tokens"]
    assert [(each["text"], each["id"], each["special"], each["count"]) for each in record["tokens"]] == [
        ("<think>", 320, False, 24),
        ("</think>", 321, True, 24),
    ]
    assert (record["rows_before"], record["rows"]) == (320, 322)
    assert json.loads(diablo("plan", recipe, "output=runs/x", "--json")[1])["trained_tokens"]["rows"] == 322


def test_a_row_starts_as_the_mean_of_its_pieces(models):
    for kind, folder in models.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = load_model(str(folder), torch.float32)
        pieces = tokenizer("<think>")["input_ids"]
        before = {
            HEAD: model.lm_head.weight.detach().clone(),
            EMBEDDING: model.model.embed_tokens.weight.detach().clone(),
        }
        tokens = add_tokens(str(folder), tokenizer, model.config, dict.fromkeys(NEW, False))
        state = torch.random.get_rng_state() if tokens.rows == tokens.rows_before else None
        give_rows(model, tokens)
        assert tokenizer("<think>")["input_ids"] == [320]
        assert model.config.vocab_size == tokens.rows == max(322, len(before[EMBEDDING])), kind
        assert state is None or torch.equal(state, torch.random.get_rng_state())
        for name, after in ((EMBEDDING, model.model.embed_tokens.weight), (HEAD, model.lm_head.weight)):
            torch.testing.assert_close(after[320], before[name][pieces].mean(0))
            assert torch.equal(after[:320], before[name][:320])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == KINDS[kind].get("tied", False)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_trained_saved_and_merged(diablo, models, runs, kind):
    run, is_tied = runs[kind], KINDS[kind].get("tied", False)
    # What lies in a run's folder is computed in the run's precision.
    folder = run / "merged"
    saved = weights(run)
    assert {key for key in saved if "blocks" not in key} == (
        {ROWS_IN_FILE} if is_tied else {ROWS_IN_FILE, HEAD_IN_FILE}
    )
    assert all(saved[key].shape == (2, 32) for key in saved if "blocks" not in key)
    status, out, _ = diablo("merge", run, folder)
    assert status == 0
    assert "plus the blocks on its diagonal and the rows of the tokens, to the bit" in out
    merged, base = base_weights(folder), base_weights(models[kind])
    settings = json.loads((folder / "config.json").read_text())
    rows = max(322, len(base[EMBEDDING]))
    assert settings["vocab_size"] == len(merged[EMBEDDING]) == rows
    assert settings["tie_word_embeddings"] == is_tied
    assert merged.keys() == base.keys()
    assert torch.equal(merged[EMBEDDING][320:322], saved[ROWS_IN_FILE])
    assert torch.equal(merged[EMBEDDING][:320], base[EMBEDDING][:320])
    assert torch.equal(merged[EMBEDDING][322:], base[EMBEDDING][322:])
    if not is_tied:
        assert torch.equal(merged[HEAD][320:322], saved[HEAD_IN_FILE])
        assert torch.equal(merged[HEAD][:320], base[HEAD][:320])
    asked = ["How many are 3 and 3?<think>", "--max-new-tokens", 5]
    answer = diablo("generate", run, *asked)[1]
    assert diablo("generate", folder, *asked)[1] == answer
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.convert_tokens_to_ids(NEW) == [320, 321]
    assert loaded.decode([320, 321], skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_rows_move_from_where_they_start(models, runs, kind):
    model = load_model(str(models[kind]), torch.float32)
    tokens = add_tokens("", AutoTokenizer.from_pretrained(models[kind]), model.config, dict.fromkeys(NEW, False))
    start = give_rows(model, tokens).model.embed_tokens.weight[320:]
    moved = (weights(runs[kind])[ROWS_IN_FILE] - start).abs().amax(1)
    assert (moved > 0.01).all()


@pytest.mark.parametrize("kind", ["tied", "untied", "spare"])
def test_peft_loads_the_adapter_without_the_command_line(models, runs, kind):
    folder = runs[kind] / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("How many are 3 and 3?<think>3 + 3</think> x", return_tensors="pt")
    assert {320, 321} <= set(batch["input_ids"].flatten().tolist())
    alone = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    base = AutoModelForCausalLM.from_pretrained(models[kind])
    if kind != "spare":
        with pytest.raises(ValueError, match=r"call model\.resize_token_embeddings\(322\) before the adapter"):
            PeftModel.from_pretrained(base, folder)
        base.resize_token_embeddings(322)
    known = PeftModel.from_pretrained(base, folder).eval()
    logits = alone(input_ids=batch["input_ids"]).logits
    assert torch.equal(logits, known(input_ids=batch["input_ids"]).logits)
    card = (folder / "README.md").read_text()
    assert "`<think>`, `</think>`. Take the tokenizer of these files." in card
    assert ("`model.resize_token_embeddings(322)`" in card) == (kind != "spare")


def test_a_resumed_run_ends_with_the_same_rows_to_the_bit(diablo, recipe, tmp_path):
    run = tmp_path / "run"
    assert diablo("train", recipe, f"output={run}", "training.save_steps=2")[0] == 0
    undisturbed = weights(run)
    checkpoint = load_file(run / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert checkpoint.keys() == undisturbed.keys()
    (run / "run.json").unlink()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    assert diablo("train", run / "recipe.yaml", "--resume")[0] == 0
    assert all(torch.equal(values, undisturbed[name]) for name, values in weights(run).items())


def test_training_goes_on_with_the_tokens_of_the_adapter(diablo, recipe, runs, tmp_path):
    text = recipe.read_text()
    recipe.write_text(
        "".join(line for line in text.splitlines(keepends=True) if "new_tokens" not in line and "method" not in line)
    )
    first, second = runs["untied"], tmp_path / "second"
    status, out, _ = diablo("train", recipe, f"adapter={first}", f"output={second}", "--dry-run")
    assert status == 0
    assert "<think> 24 x, </think> 24 x in the training rows" in out
    assert diablo("train", recipe, f"adapter={first}", f"output={second}")[0] == 0
    losses = [json.loads((run / "run.json").read_text())["training"]["held_out_loss"] for run in (first, second)]
    assert losses[1][0][1] == pytest.approx(losses[0][-1][1], abs=1e-4)
    before, after = weights(first), weights(second)
    assert before.keys() == after.keys()
    assert not torch.equal(before[ROWS_IN_FILE], after[ROWS_IN_FILE])
    assert AutoTokenizer.from_pretrained(second / "adapter").convert_tokens_to_ids(NEW) == [320, 321]
    status, _, error = diablo("train", recipe, f"adapter={first}", 'new_tokens=["<a>"]', f"output={second}")
    assert status == 2
    assert "leave new_tokens out, or merge the adapter and give the merged model as model" in error


@pytest.mark.parametrize("method", ["lora", "dora", "{name: peft, type: LORA, r: 4, target_modules: [q_proj]}", "full"])
@pytest.mark.parametrize("kind", ["untied", "one spare"])
def test_other_methods_train_them_too(diablo, models, recipe, tmp_path, kind, method):
    run = tmp_path / "run"
    merged = run / ("model" if method == "full" else "merged")
    arguments = [f"model={models[kind]}", f"method={method}", f"output={run}", "training.max_steps=2"]
    assert diablo("train", recipe, *arguments)[0] == 0
    if method != "full":
        assert {key for key in weights(run) if "lora" not in key} <= {ROWS_IN_FILE, HEAD_IN_FILE}
        assert diablo("merge", run, merged)[0] == 0
        assert torch.equal(base_weights(merged)[EMBEDDING][320:322], weights(run)[ROWS_IN_FILE])
    settings = json.loads((merged / "config.json").read_text())
    assert (settings["vocab_size"], settings["tie_word_embeddings"]) == (322, kind == "one spare")
    assert AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(NEW) == [320, 321]
    asked = ["How many are 3 and 3?<think>", "--max-new-tokens", 5]
    assert diablo("generate", run, *asked)[1] == diablo("generate", merged, *asked)[1]


def test_a_base_in_4_bits_has_its_rows_trained_and_merged(diablo, recipe, tmp_path):
    pytest.importorskip("bitsandbytes")
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert diablo("train", recipe, "quantization=nf4", f"output={run}", "training.max_steps=2")[0] == 0
    assert diablo("merge", run, merged, "--into", "stored")[0] == 0
    assert torch.equal(base_weights(merged)[EMBEDDING][320:], weights(run)[ROWS_IN_FILE])
    assert diablo("generate", run, "How many?<think>", "--max-new-tokens", 2)[0] == 0


def test_a_stored_copy_of_a_tied_weight_gets_the_rows_too(diablo, models, runs, tmp_path):
    # Some models store a tied weight twice.
    base = tmp_path / "twice"
    shutil.copytree(models["tied"], base)
    tensors = base_weights(base)
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, base / "model.safetensors", {"format": "pt"})
    assert diablo("merge", runs["tied"], tmp_path / "merged", "--base", base)[0] == 0
    merged = base_weights(tmp_path / "merged")
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    assert len(merged[HEAD]) == 322


def test_engines_that_serve_lora_have_no_place_for_rows(diablo, runs, tmp_path):
    status, _, error = diablo("to-lora", runs["tied"], tmp_path / "lora", "--rank", 4)
    assert status == 2
    assert "has trained rows of tokens" in error
    assert not (tmp_path / "lora").exists()


def test_a_start_of_a_run_names_what_is_never_trained(diablo, recipe, tmp_path):
    arguments = ['new_tokens=["<think>", "<|tool|>"]', f"output={tmp_path / 'run'}", "training.max_steps=1"]
    status, _, error = diablo("train", recipe, *arguments)
    assert status == 0
    assert "new_tokens: <|tool|> occurs in no training row, so that its row is not learned." in error


def test_what_cannot_be_trained_is_refused_before_the_model_is_loaded(diablo, recipe, tmp_path):
    def refused(*overrides: str) -> str:
        status, _, error = diablo("train", recipe, f"output={tmp_path / 'run'}", *overrides)
        assert status == 2
        assert not (tmp_path / "run").exists()
        return " ".join(error.split())

    assert "has '</s>' (token 1) already; leave out what is there" in refused('new_tokens=["</s>", "<a>"]')
    assert "has 'the' (token" in refused('new_tokens=["the"]')
    targets = "which is adapted by blocks: leave it out of the target modules"
    for layer in ("model.embed_tokens", "lm_head"):
        named = layer.rpartition(".")[2]
        words = refused(f"method={{num_blocks: 4, target_modules: [q_proj, {named}]}}")
        assert f"method: new_tokens trains rows of {layer}, {targets}" in words
    assert "output layer is among them, whose rows new_tokens trains" in refused(
        "method={name: lora, target_modules: [lm_head]}"
    )
