"""Models with a learned vector for each position read no more tokens than they have vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import make_tiny_seeing_model
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.models.loading import learned_positions, load_config, meta_model
from diablo.models.ready import load_for_generation
from diablo.planning.making import make_plan
from diablo.recipes.recipe import Recipe
from diablo.scoring.generation import complete
from diablo.scoring.likelihood import score_candidates


def folder_of(kind: str, tiny_model: Path, folder: Path) -> Path:
    """A model of 48 positions, with the tokenizer of the tiny model."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=48, **sizes)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        shape = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = OPTConfig(**shape, word_embed_proj_dim=16, max_position_embeddings=48, **sizes)
        OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_rows_that_are_longer_than_the_positions_are_left_out_before_training(kind, tiny_model, tmp_path):
    model, rows = folder_of(kind, tiny_model, tmp_path / kind), tmp_path / "rows.jsonl"
    texts = ["short", "long " * 40, "short too"]
    rows.write_text("".join(json.dumps({"prompt": text, "completion": "yes"}) + "\n" for text in texts))

    def recipe(on_long: str) -> Recipe:
        settings = {"name": "diablo", "num_blocks": 4, "target_modules": "all-linear"}
        data = {"train": str(rows), "on_long": on_long}
        return Recipe.model_validate({"model": str(model), "data": data, "method": settings, "output": "unused"})

    plan = make_plan(recipe("drop"))
    assert [row.number for row in plan.train] == [1, 3]
    assert [place.number for place in plan.too_long] == [2]
    with pytest.raises(UserError, match=r"and the model reads 48 tokens; 1 of 3 rows are longer .* row 2\)"):
        make_plan(recipe("error"))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_prompt_writes_as_much_as_the_positions_leave_whatever_stands_beside_it(kind, tiny_model, tmp_path):
    model, encoder = load_for_generation(str(folder_of(kind, tiny_model, tmp_path / kind)))
    # No text is to end before its room does.
    encoder.stop_token_ids = {319}
    prompts = [[5] * length for length in (46, 3, 30, 46, 28, 47, 29)]
    asked = [(tokens, complete(model, encoder, [tokens], max_new_tokens=20)[0]) for tokens in prompts]
    assert complete(model, encoder, prompts, max_new_tokens=20) == [alone for _, alone in asked]
    written = [len(encoder.tokenizer(alone.text, add_special_tokens=False)["input_ids"]) for _, alone in asked]
    assert max(written) > 5
    with pytest.raises(UserError, match="a text with its answer takes at least 49 positions, and the model has 48"):
        complete(model, encoder, [*prompts, [5] * 48], max_new_tokens=20)


def test_candidates_that_have_no_place_are_refused(tiny_model, tmp_path):
    model, encoder = load_for_generation(str(folder_of("gpt2", tiny_model, tmp_path / "gpt2")))
    row = Row(1, "a" * 60, " yes")
    with pytest.raises(UserError, match="and the model has 48; give shorter"):
        score_candidates(model, encoder, [[row]])


def test_general_text_is_cut_to_the_positions(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    settings = {
        "model": str(folder_of("gpt2", tiny_model, tmp_path / "gpt2")),
        "data": {"train": str(tmp_path / "rows.jsonl")},
        "evaluation": {"general": "builtin"},
        "method": {"num_blocks": 4, "target_modules": "all-linear"},
        "output": "unused",
    }
    assert max(row.length for row in make_plan(Recipe.model_validate(settings)).general) == 48


@pytest.mark.parametrize("kind", ["idefics3", "llava"])
def test_positions_in_an_image_are_none_of_a_text(kind, tmp_path):
    assert learned_positions(meta_model(load_config(str(make_tiny_seeing_model(tmp_path / kind, kind))))) is None


def test_a_model_that_turns_its_vectors_by_their_position_has_no_such_end(tiny_model):
    assert learned_positions(meta_model(load_config(str(tiny_model)))) is None
