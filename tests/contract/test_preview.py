"""The list of what a configuration adapts, which must be what is then adapted."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import CASES, llama, mlp, tuner_layers
from torch import nn

from diablo import DiabloConfig, preview_targets

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_the_preview_is_what_is_then_adapted(case):
    model, config = case.base(), case.config()
    preview = preview_targets(model, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    adapted = get_peft_model(model, config)
    layers = tuner_layers(adapted)
    assert {target.name: target.layout for target in preview.targets} == {
        name: layer.diablo_layout["default"] for name, layer in layers.items()
    }
    assert preview.num_parameters == adapted.get_nb_trainable_parameters()[0]
    # Again over the adapters that the model has now.
    assert preview_targets(adapted.base_model.model, config) == preview


def test_what_is_left_alone_is_listed_with_the_reason():
    config = DiabloConfig(num_blocks=4, exclude_modules=["k_proj"], layers_to_transform=[0])
    preview = preview_targets(llama(), config)
    reasons = {skipped.name.removeprefix("model."): skipped.reason for skipped in preview.skipped}
    assert reasons["embed_tokens"] == "not in target_modules"
    assert reasons["lm_head"] == "not in target_modules"
    assert reasons["layers.0.self_attn.o_proj"] == "not in target_modules"
    assert reasons["layers.0.self_attn.k_proj"] == "left out by exclude_modules"
    assert reasons["layers.1.self_attn.q_proj"] == "left out by layers_to_transform"
    assert config.target_modules is None, "the configuration was changed"
    text = str(preview)
    assert "q_proj     16 -> 16   4 x 4 x 4  1       64" in text
    assert "together" in text
    assert "left out by layers_to_transform" in text


def test_the_preview_needs_no_weights():
    with torch.device("meta"):
        model = mlp()
    assert len(preview_targets(model, DiabloConfig(num_blocks=4, target_modules=["up", "down"])).targets) == 2


def test_one_name_of_several_that_matches_nothing_is_an_error():
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj", "v_prj"])
    for act in (preview_targets, get_peft_model):
        with pytest.raises(ValueError, match=r"target_modules has v_prj, which match no module.*v_proj"):
            act(llama(), config)


@pytest.mark.parametrize("target", ["out_proj", "linear1"])
def test_a_layer_whose_weight_torch_reads_without_calling_it_is_refused(target):
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(TypeError, match=rf"{target} cannot be adapted: .* without effect"):
        get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=[target]))
