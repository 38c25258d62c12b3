"""Modules that an adapter trains whole (``modules_to_save``), and blocks in the same places."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny_models import fill, llama, mlp, output, tuner_layers
from torch import nn
from versions import not_on_oldest_peft

from diablo import DiabloConfig, preview_targets


def config(*targets: str, **settings) -> DiabloConfig:
    return DiabloConfig(**{"num_blocks": 2, "target_modules": list(targets), **settings})


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize(
    ("build", "saved", "second", "held"),
    [
        (mlp, "down", config("down"), "down"),
        (mlp, "down", config("up", "down"), "down"),
        (mlp, "down", config(target_modules=".*(up|down)"), "down"),
        (mlp, "down", config("up", target_parameters=["down.modules_to_save.default.weight"]), "down"),
        # What is inside would be adapted in the model and in the first adapter's copy, and saved by the names of these.
        (llama, "mlp", config("q_proj", "up_proj"), "model.layers.0.mlp, model.layers.1.mlp"),
    ],
    ids=["alone", "one of two", "expression", "parameter", "inside"],
)
def test_what_another_adapter_trains_whole_cannot_be_adapted(build, saved, second, held):
    first = "up" if build is mlp else "q_proj"
    model = fill(get_peft_model(build(), config(first, modules_to_save=[saved]))).eval()
    before, known = output(model), names(model)
    words = (
        rf"match {held} or modules inside, of which the modules_to_save of another adapter \(default\) keeps a copy: "
    )
    with pytest.raises(ValueError, match=words + "leave them out by exclude_modules, train them whole by modules_to_"):
        model.add_adapter("second", second)
    assert names(model) == known
    assert torch.equal(output(model), before)


@not_on_oldest_peft
def test_tokens_that_another_adapter_trains_are_named():
    lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[0, 1])
    model = inject_adapter_in_model(lora, llama())
    with pytest.raises(ValueError, match=r"match model\.embed_tokens or .* trainable_token_indices of another adapter"):
        inject_adapter_in_model(config("embed_tokens"), model, "second")


def test_a_state_dict_cannot_reach_into_what_another_adapter_trains_whole():
    model = get_peft_model(mlp(), config("up", modules_to_save=["down"])).base_model.model
    for key in ("down.diablo_blocks", "down.original_module.diablo_blocks"):
        with pytest.raises(ValueError, match="the blocks of the state_dict match down or modules inside"):
            inject_adapter_in_model(config("up"), model, "second", state_dict={key: torch.ones(2, 12, 4)})


def test_all_linear_leaves_out_what_another_adapter_trains_whole():
    model = get_peft_model(mlp(), config("up", modules_to_save=["down"]))
    model.add_adapter("second", config(target_modules="all-linear"))
    assert tuner_layers(model).keys() == {"up", "head"}
    assert model.peft_config["second"].target_modules == {"up", "head"}


def test_one_module_can_be_trained_whole_by_two_adapters():
    model = get_peft_model(mlp(), config("up", modules_to_save=["down"]))
    model.add_adapter("second", config("up", "down", modules_to_save=["down"]))
    assert tuner_layers(model).keys() == {"up"}
    assert model.base_model.model.down.modules_to_save.keys() == {"default", "second"}


def test_a_layer_that_another_adapter_adapts_cannot_be_trained_whole():
    model = fill(get_peft_model(mlp(), config("up", "down"))).eval()
    before, known = output(model), names(model)
    with pytest.raises(ValueError, match="modules_to_save has down, which another adapter of the model adapts"):
        model.add_adapter("second", config("up", modules_to_save=["down"]))
    assert names(model) == known
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(("target", "saved"), [("q_proj", "q_proj"), ("q_proj", "self_attn")])
def test_targets_that_the_same_adapter_trains_whole_are_said_to_be(target, saved):
    with pytest.raises(ValueError, match=rf"nothing in .* modules_to_save=\['{saved}'\], which are trained whole"):
        get_peft_model(llama(), config(target, modules_to_save=[saved]))


def test_the_preview_says_what_is_trained_whole():
    adapted = get_peft_model(mlp(), config("up", modules_to_save=["down"])).base_model.model
    (down,) = preview_targets(adapted, config(target_modules="all-linear")).skipped
    assert (down.name, down.module_type, down.reason) == ("down", "Linear", "trained whole by another adapter")
    own = preview_targets(mlp(), config("up", "down", modules_to_save=["down"])).skipped
    assert [(layer.name, layer.reason) for layer in own] == [
        ("down", "trained whole by modules_to_save"),
        ("head", "not in target_modules"),
    ]
