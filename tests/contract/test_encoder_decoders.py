"""The tuner by itself on encoder-decoders: its default targets, and PEFT's verbs with their own task type."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import AutoPeftModelForSeq2SeqLM, PeftModelForSeq2SeqLM, get_peft_model
from tiny_models import bart, fill, t5, tuner_layers
from transformers import AutoModelForSeq2SeqLM, OPTConfig, OPTForCausalLM

from diablo import DiabloConfig
from diablo.tuner.targets import default_target_modules

MODELS = {
    "t5": (t5, {"q", "k", "v", "wi", "wo"}),
    "t5 with a gate": (partial(t5, gated=True), {"q", "k", "v", "wi_1", "wo"}),
    "bart": (bart, {"q_proj", "k_proj", "v_proj", "fc1", "fc2"}),
}
every_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)
IDS = torch.arange(3, 21).reshape(2, 9)


def adapted(make, **settings):
    config = DiabloConfig(num_blocks=4, task_type="SEQ_2_SEQ_LM", **settings)
    return fill(get_peft_model(make(), config)).eval()


def written(model) -> torch.Tensor:
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False)


@every_model
def test_the_defaults_are_the_papers_five_projections_in_both_parts(make, targets):
    model = adapted(make)
    assert isinstance(model, PeftModelForSeq2SeqLM)
    names = tuner_layers(model)
    assert {name.rpartition(".")[2] for name in names} == targets
    assert {name.removeprefix("model.").partition(".")[0] for name in names} == {"encoder", "decoder"}


def test_a_decoder_whose_layers_have_the_same_names_keeps_pefts_choice():
    config = OPTConfig(
        vocab_size=32, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2
    )
    assert default_target_modules(OPTForCausalLM(config), "opt") == {"q_proj", "v_proj"}


@every_model
def test_a_saved_adapter_generates_the_same_and_merged_it_does_too(make, targets, tmp_path):
    make().save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    model = adapted(lambda: base)
    expected = written(model)
    assert not torch.equal(expected, written(make()))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(written(loaded), expected)
    merged = loaded.merge_and_unload()
    assert torch.equal(written(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(written(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged").eval()), expected)


@every_model
def test_a_step_on_labels_reaches_every_block(make, targets):
    model = adapted(make).train()
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS[:, :6].contiguous()).loss.backward()
    for name, layer in tuner_layers(model).items():
        assert layer.diablo_blocks["default"].grad.abs().sum() > 0, name
