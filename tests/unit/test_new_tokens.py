"""New tokens of a recipe: what is refused, and what becomes of a tokenizer, without a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_tiny_model
from transformers import AutoConfig, AutoTokenizer, GPTJConfig

from diablo.data.encoding import EncodedRow
from diablo.errors import UserError
from diablo.models.loading import meta_model
from diablo.models.vocabulary import TrainedTokens, add_tokens, config_with_rows
from diablo.planning.making import make_plan
from diablo.planning.suited import check_suited
from diablo.planning.tokens import TokenCounts
from diablo.recipes.methods import LoraMethod, MissMethod
from diablo.recipes.reading import check_settings
from diablo.training.engines import check_shardable


def recipe(tmp_path: Path, **settings):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "<think> b"}\n')
    given = {
        "model": "builtin:smollm2-135m",
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "output": str(tmp_path / "x"),
    }
    return check_settings({**given, **settings})


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "new_tokens: found an empty list; name at least one token"),
        ([""], "new_tokens: found ''; give a text that is not empty, without white space at its ends"),
        (["<a>", " "], "new_tokens: found ' '; give a text that is not empty"),
        (["<a> "], "new_tokens: found '<a> '; give a text that is not empty"),
        (["<a>", {"text": "<a>", "special": True}], "new_tokens: found '<a>' twice; name each token once"),
        ("<a>", "new_tokens: found '<a>'; allowed: a list of texts"),
        ([5], "new_tokens: found 5; allowed: a list of texts"),
        (
            [{"text": "<a>", "specal": True}],
            r"new_tokens.specal: unknown key; allowed: text, special. Did you mean special",
        ),
        ([{"special": True}], "new_tokens.text: missing; give a text"),
        ([{"text": "<a>", "special": "perhaps"}], "new_tokens.special: found 'perhaps'; allowed: true or false"),
    ],
)
def test_texts_that_cannot_be_tokens_are_refused_without_a_tokenizer(tmp_path, tokens, words):
    with pytest.raises(UserError, match=words):
        recipe(tmp_path, new_tokens=tokens)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("miss", "beside miss; take diablo, lora, rslora, dora or full as the method"),
        ("pissa", "beside pissa"),
        ({"name": "peft", "type": "vera"}, "beside VERA"),
        ({"name": "peft", "type": "trainable_tokens", "token_indices": [1]}, "beside TRAINABLE_TOKENS"),
        (
            {"name": "peft", "type": "lora", "trainable_token_indices": [1]},
            "found beside method.trainable_token_indices, which says which rows are trained; give one of the two",
        ),
    ],
)
def test_methods_that_cannot_train_rows_are_refused(tmp_path, method, words):
    with pytest.raises(UserError, match=words):
        recipe(tmp_path, new_tokens=["<a>"], method=method)


def test_tokens_of_both_kinds_are_read_whole_wherever_they_stand(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pieces = tokenizer("<think>")["input_ids"]
    tokens = add_tokens("m", tokenizer, AutoConfig.from_pretrained(tiny_model), {"<think>": False, "<|tool|>": True})
    assert tokens.pieces[320] == pieces
    assert (tokens.ids, tokens.special, tokens.rows_before, tokens.rows) == ([320, 321], {321}, 320, 322)
    ids = tokenizer("a<think>b<|tool|>c")["input_ids"]
    assert [ids.count(320), ids.count(321)] == [1, 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>bc"


def test_a_token_that_is_a_part_of_another_one_is_still_itself(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    add_tokens("m", tokenizer, AutoConfig.from_pretrained(tiny_model), {"<a": False, "<a>": False})
    assert tokenizer("<a<a>")["input_ids"] == [320, 321]


def test_a_comparison_names_every_method_that_cannot(tiny_model, tmp_path):
    settings = {"model": str(tiny_model), "method": {"num_blocks": 4}, "precision": "fp32"}
    plan = make_plan(recipe(tmp_path, new_tokens=["<think>"], **settings))
    methods = [LoraMethod(name="lora"), LoraMethod(name="pissa"), MissMethod(name="miss")]
    with pytest.raises(UserError, match=r"beside pissa, miss; take .* \(or as --methods of a comparison\)"):
        check_suited(plan.recipe, plan.config, plan.dtype, methods)


def test_an_output_layer_with_a_bias_is_refused():
    model = meta_model(GPTJConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, rotary_dim=4))
    tokens = TrainedTokens({30: "<a>"}, {}, frozenset(), 32, 32, None)
    with pytest.raises(UserError, match=r"output layer of a gptj model has a bias, .* train with method: full"):
        tokens.token_indices(model)


def test_the_output_layer_is_trained_where_it_has_a_weight_of_its_own(tmp_path):
    for tied, layers in ((False, {"model.embed_tokens", "lm_head"}), (True, {"model.embed_tokens"})):
        folder = make_tiny_model(tmp_path / str(tied), tied=tied)
        config = AutoConfig.from_pretrained(folder)
        tokens = add_tokens("m", AutoTokenizer.from_pretrained(folder), config, {"<a>": False})
        grown = config_with_rows(config, tokens)
        assert (grown.vocab_size, config.vocab_size) == (321, 320)
        assert tokens.token_indices(meta_model(grown)).keys() == layers


def test_what_occurs_in_no_row_is_said_with_its_reason():
    tokens = TrainedTokens({7: "<a>", 8: "<b>", 9: "<c>"}, {}, frozenset({9}), 10, 10, None)
    row = EncodedRow(1, [7, 8, 7], [-100, 8, 7])
    counts = TokenCounts(tokens, [row], plain=False)
    assert counts.absent == "<c> occurs in no training row, so that its row is not learned"
    assert "plain keeps the text of special tokens text" in TokenCounts(tokens, [row], plain=True).absent
    record = counts.record()["tokens"]
    assert [(token["count"], token["supervised"]) for token in record] == [(2, 1), (1, 1), (0, 0)]
    assert "<b>, <c> occur in no" in TokenCounts(tokens, [EncodedRow(1, [7], [7])], plain=False).absent


def test_a_sharded_model_has_no_rows_of_tokens(tiny_model, tmp_path):
    plan = make_plan(
        recipe(tmp_path, model=str(tiny_model), new_tokens=["<think>"], method={"num_blocks": 4}, precision="fp32")
    )
    with pytest.raises(UserError, match=r"new_tokens: found rows of tokens to train, .* train without FSDP"):
        check_shardable(plan)
    check_shardable(replace(plan, trained_tokens=None))
