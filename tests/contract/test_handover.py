"""Weights handed to an engine that generates."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_bits
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig
from diablo.training.handover import changed_weights

CONFIGS = {
    "diablo": DiabloConfig(num_blocks=4, task_type="CAUSAL_LM"),
    "lora": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_dora=True, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_what_is_handed_over_is_what_a_merged_model_has_and_the_base_has_not(tiny_model, method):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    before = {name: values.clone() for name, values in base.state_dict().items()}
    model = get_peft_model(base, CONFIGS[method])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    handed = {}
    for name, values in changed_weights(model):
        # Between two steps of the iteration the model is as it was.
        now = {name.replace(".base_layer", ""): values for name, values in model.get_base_model().state_dict().items()}
        assert_same_bits({name: now[name] for name in before}, before)
        handed[name] = values
    merged = model.merge_and_unload().state_dict()
    changed = {name for name, values in merged.items() if not torch.equal(values, before[name])}
    assert handed.keys() == changed
    assert all(torch.equal(values, merged[name]) for name, values in handed.items())


def test_of_a_model_that_is_trained_whole_all_is_handed_over(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert [name for name, _ in changed_weights(model)] == [name for name, _ in model.named_parameters()]
