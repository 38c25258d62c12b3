"""A model made of more layers than it has: replicated ones share the base weights and have blocks of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import fill, llama, output, tuner_layers

from diablo import DiabloConfig, preview_targets

RANGES = [(0, 2), (1, 2), (0, 2)]


def config(**settings) -> DiabloConfig:
    return DiabloConfig(**{"num_blocks": 4, "target_modules": ["q_proj"], "layer_replication": RANGES, **settings})


def test_replicated_layers_share_base_weights_and_have_blocks_of_their_own():
    model = get_peft_model(llama(), config())
    layers = list(tuner_layers(model).values())
    assert len(layers) == 5
    pointers = [layer.get_base_layer().weight.data_ptr() for layer in layers]
    assert pointers == [pointers[0], pointers[1], pointers[1], pointers[0], pointers[1]]
    assert len(set(pointers)) == 2
    assert len({layer.diablo_blocks["default"].data_ptr() for layer in layers}) == 5
    by_hand = llama()
    first, second = by_hand.model.layers
    by_hand.model.layers = torch.nn.ModuleList([copy.deepcopy(each) for each in (first, second, second, first, second)])
    for index, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = index
    by_hand.config.num_hidden_layers = 5
    assert torch.equal(output(model), output(by_hand))
    before = output(fill(model))
    layers[2].diablo_blocks["default"].data += 0.3
    assert not torch.equal(output(model), before)


def test_it_is_saved_and_loaded(tmp_path):
    model = fill(get_peft_model(llama(), config()))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))


def test_merging_is_refused_where_weights_are_shared():
    model = fill(get_peft_model(llama(), config()))
    before = output(model)
    with pytest.raises(ValueError, match="shares its weight with"):
        model.merge_adapter()
    assert torch.equal(output(model), before)


def test_a_second_adapter_is_over_the_same_layers():
    model = fill(get_peft_model(llama(), config()))
    before = output(model)
    model.add_adapter("other", config(num_blocks=2))
    assert len(tuner_layers(model)) == 5
    assert torch.equal(output(model), before)
    with pytest.raises(ValueError, match="layer_replication=None differs"):
        model.add_adapter("third", config(layer_replication=None))


def test_a_saved_adapter_loads_as_the_second_one_of_a_model_with_the_same_layers(tmp_path):
    saved = fill(get_peft_model(llama(), config()), seed=5)
    saved.save_pretrained(tmp_path)
    model = get_peft_model(llama(), config())
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(output(model), output(saved))


def test_the_preview_lists_replicated_layers_and_leaves_the_model_alone():
    model = llama()
    before = output(model)
    assert len(preview_targets(model, config()).targets) == 5
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(
    ("settings", "words"), [({"layer_replication": [(0, 3)]}, "has 2"), ({"target_modules": ["q_prj"]}, "q_prj")]
)
def test_what_does_not_fit_leaves_the_model_as_it_was(settings, words):
    model = llama()
    with pytest.raises(ValueError, match=words):
        get_peft_model(model, config(**settings))
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
