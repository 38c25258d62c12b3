"""Rows of tokens that an adapter trains beside its blocks (``trainable_token_indices``)."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import llama
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM

from diablo import DiabloConfig, convert_to_lora, hotswap_adapter
from diablo.tuner.tokens import token_layers, unmerged_tokens

TOKENS = torch.tensor([[3, 30, 7, 31, 2], [31, 4, 30, 5, 30]])
ROWS = [30, 31]
BOTH = {"model.embed_tokens": ROWS, "lm_head": ROWS}


def config(rows=ROWS, *targets: str, **settings) -> DiabloConfig:
    return DiabloConfig(
        **{
            "num_blocks": 2,
            "target_modules": list(targets) or ["q_proj", "up_proj"],
            "trainable_token_indices": rows,
            "task_type": "CAUSAL_LM",
            **settings,
        }
    )


def tied() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    model.train()
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=0.05)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights, by their names in a model without adapters."""
    inside = ("token_adapter.", "base_layer.")
    named = model.named_parameters(remove_duplicate=False)
    found = {name: own for name, own in named if "diablo_blocks" not in name and "delta" not in name}
    for part in inside:
        found = {name.replace(part, ""): own for name, own in found.items()}
    return {name: own.detach().clone() for name, own in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("build", "rows"), [(tied, ROWS), (llama, BOTH)], ids=["tied", "untied"])
def test_rows_are_trained_saved_loaded_merged_and_unmerged_to_the_bit(tmp_path, build, rows, dtype):
    base = build().to(dtype)
    before = weights_of(copy.deepcopy(base))
    model = get_peft_model(base, config(rows))
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad and "blocks" not in name}
    assert [tuple(own.shape) for own in trained.values()] == [(2, 16)] * (1 if build is tied else 2)
    assert {own.dtype for own in trained.values()} == {torch.float32}
    start = logits(model)
    assert torch.equal(start, logits(build().to(dtype)))
    known = logits(train(model))
    assert not torch.equal(start, known)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build().to(dtype), tmp_path).eval()
    assert not any(own.requires_grad for own in loaded.parameters())
    model.merge_adapter()
    loaded.merge_adapter()
    assert torch.equal(logits(model), logits(loaded))
    assert torch.equal(logits(model), known)
    model.unmerge_adapter()
    after = weights_of(model.get_base_model())
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with model.disable_adapter():
        assert torch.equal(logits(model), start)

    plain = model.merge_and_unload()
    assert torch.equal(logits(plain), known)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == (build is tied)
    changed = (plain.model.embed_tokens.weight != before["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    assert changed.tolist() == ROWS


def test_no_other_row_gets_a_gradient():
    model = get_peft_model(llama(), config())
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    wrapper = model.get_base_model().model.embed_tokens
    assert wrapper.token_adapter.trainable_tokens_delta["default"].grad.abs().amax(1).gt(0).all()
    assert wrapper.token_adapter.base_layer.weight.grad is None


def test_adapters_with_rows_are_swapped_while_merged_deleted_and_joined_by_others(tmp_path):
    model = train(get_peft_model(llama(), config()))
    first = logits(model)
    model.add_adapter("second", config([5, 30]))
    assert not any(own.requires_grad for name, own in model.named_parameters() if ".second" in name)
    model.set_adapter("second")
    second = logits(train(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.merge_adapter()
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), second)
    embedding = model.get_base_model().model.embed_tokens
    assert embedding.token_adapter.merged_adapters == ["second"]
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), first)
    assert torch.equal(embedding.token_adapter.base_layer.weight, llama().model.embed_tokens.weight)


def test_what_fails_while_rows_are_merged_leaves_them_merged():
    model = train(get_peft_model(tied(), config()))
    model.merge_adapter()
    before = weights_of(model)

    def fail() -> None:
        with unmerged_tokens(model, without="default"):
            assert not any(layer.merged for layer in token_layers(model))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(layer.merged_adapters == ["default"] for layer in token_layers(model))
    assert all(torch.equal(own, before[name]) for name, own in weights_of(model).items())


def test_rows_of_one_batch_have_the_tokens_of_their_own_adapters():
    model = train(get_peft_model(llama(), config()))
    model.add_adapter("second", config([5, 30]))
    model.set_adapter("second")
    train(model)
    alone = []
    for name in ("default", "second"):
        model.set_adapter(name)
        alone.append(logits(model))
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=["second", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([alone[1][0], alone[0][1]]), rtol=1e-4, atol=1e-5)


def test_swapping_gives_the_saved_rows_also_while_merged(tmp_path):
    saved = train(get_peft_model(llama(), config()))
    saved.save_pretrained(tmp_path / "saved")
    get_peft_model(llama(), config([5, 30])).save_pretrained(tmp_path / "other")
    model = get_peft_model(llama(), config()).eval()
    model.merge_adapter()
    hotswap_adapter(model, tmp_path / "saved")
    saved.merge_adapter()
    assert torch.equal(logits(model), logits(saved))
    model.unmerge_adapter()
    assert torch.equal(
        model.get_base_model().model.embed_tokens.token_adapter.base_layer.weight, llama().model.embed_tokens.weight
    )
    with pytest.raises(ValueError, match="swap adapters of the same tokens"):
        hotswap_adapter(model, tmp_path / "other")


def gptj() -> nn.Module:
    # Its output layer has a bias.
    return GPTJForCausalLM(GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, rotary_dim=4))


@pytest.mark.parametrize(
    ("build", "settings", "words"),
    [
        (llama, config([31, 32]), r"token 32, and it has 32 rows: call model.resize_token_embeddings\(33\) before"),
        (llama, config({"wte": [1]}), "has wte, which no module of the model is called"),
        (llama, config({"norm": [1]}), "a LlamaRMSNorm: rows of embeddings and of linear layers can be trained"),
        (llama, config(ROWS, "q_proj", "embed_tokens"), "model.embed_tokens, which is adapted by blocks: leave it out"),
        (llama, config(BOTH, "q_proj", "lm_head"), "lm_head, which is adapted by blocks"),
        (tied, config(ROWS, "q_proj", "lm_head"), "changes lm_head as well, which is tied to model.embed_tokens"),
        (llama, config(modules_to_save=["embed_tokens"]), "model.embed_tokens, which modules_to_save trains whole"),
        (gptj, config({"lm_head": [1]}, "q_proj"), "whose bias PEFT's layer for trained rows would leave out"),
    ],
    ids=["row", "name", "kind", "embedding", "head", "tied head", "whole", "bias"],
)
def test_what_cannot_have_trained_rows_is_refused_and_the_model_left_alone(build, settings, words):
    model = build()
    known = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, settings)
    assert [name for name, _ in model.named_modules()] == known


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([1, 1], "has a token twice"),
        ([-1], "must be a list of token ids from 0 on"),
        ("<think>", "must be a list of token ids"),
        ({"lm_head": []}, "must be a list of token ids"),
    ],
)
def test_ids_that_are_none_are_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        DiabloConfig(trainable_token_indices=rows)


def test_an_empty_list_of_tokens_means_none():
    assert DiabloConfig(trainable_token_indices=[]).trainable_token_indices is None


def test_rows_have_no_place_in_sums_and_in_lora():
    model = get_peft_model(llama(), config())
    model.add_adapter("second", config())
    with pytest.raises(ValueError, match="only adapters of blocks alone can be combined"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="engines that serve LoRA have no place: merge the adapter instead"):
        convert_to_lora(model, 4)


def test_rows_that_are_missing_or_too_many_in_a_file_are_an_error(tmp_path):
    with_rows, without = config(), config(None)
    get_peft_model(llama(), with_rows).save_pretrained(tmp_path / "with")
    get_peft_model(llama(), without).save_pretrained(tmp_path / "without")
    with pytest.raises(KeyError, match="trainable_tokens_delta"):
        PeftModel.from_pretrained(llama(), tmp_path / "without", config=config())
    with pytest.raises(RuntimeError, match=r"more tensors than the model takes: .*trainable_tokens_delta"):
        PeftModel.from_pretrained(llama(), tmp_path / "with", config=config(None))
