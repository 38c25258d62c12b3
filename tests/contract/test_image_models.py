"""Models that see images: which of their layers are adapted where no targets are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Idefics3Config,
    LlavaConfig,
    PaliGemmaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from diablo import DiabloConfig
from diablo.tuner.preview import preview_targets

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
TOWER = {**SMALL, "image_size": 8, "patch_size": 4}
QWEN = {"depth": 1, "num_heads": 2, "intermediate_size": 32, "hidden_size": 16, "out_hidden_size": 16}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}

CONFIGS: dict[str, PretrainedConfig] = {
    "llava": LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER},
        text_config={"model_type": "llama", **TEXT},
        image_token_id=63,
    ),
    "idefics3": Idefics3Config(
        vision_config=TOWER, text_config={"model_type": "llama", **TEXT}, image_token_id=63, scale_factor=1
    ),
    "gemma3": Gemma3Config(vision_config=TOWER, text_config=TEXT, mm_tokens_per_image=4, image_token_id=63),
    "paligemma": PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **TOWER, "projection_dim": 16},
        text_config={"model_type": "gemma", **TEXT},
        projection_dim=16,
        image_token_id=63,
    ),
    "qwen2.5-vl": Qwen2_5_VLConfig(vision_config=QWEN, text_config={**TEXT, "rope_scaling": ROPE}),
    "qwen3-vl": Qwen3VLConfig(
        vision_config={**QWEN, "deepstack_visual_indexes": [0]}, text_config={**TEXT, "rope_scaling": ROPE}
    ),
}


def on_meta(config: PretrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_text_part_alone_is_adapted_by_default(kind):
    model, config = on_meta(CONFIGS[kind]), DiabloConfig(num_blocks=2)
    foreseen = {target.name for target in preview_targets(model, config).targets}
    adapted = get_peft_model(model, config)
    names = {
        name.partition(".diablo_")[0].removeprefix("base_model.model.")
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    assert names == foreseen
    expected = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(names) == len(expected)  # the only layer of the text part; the towers have such names, too
    assert not any("vision" in name or "visual" in name or "project" in name for name in names)


def test_layers_of_the_vision_tower_are_adapted_where_they_are_named():
    adapted = get_peft_model(
        on_meta(CONFIGS["llava"]), DiabloConfig(num_blocks=2, target_modules=r".*vision_tower.*\.q_proj")
    )
    (name,) = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert "vision_tower" in name


def test_lora_takes_the_same_expression():
    expression = DiabloConfig(num_blocks=2)
    model = on_meta(CONFIGS["idefics3"])
    get_peft_model(model, expression)
    lora = get_peft_model(on_meta(CONFIGS["idefics3"]), LoraConfig(target_modules=expression.target_modules))
    trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert len(trained) == 10
    assert all("text_model" in name for name in trained)
