"""PEFT's ``inject_adapter_in_model`` with a state dict, which says what is adapted: diffusers loads adapters so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny_models import Case, assert_same_bits, base_weights, fill, llama, mlp, output, tuner_layers
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from diablo import DiabloConfig, DiabloParameters

TWO = ["q_proj", "o_proj"]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """An adapter's tensors by their names in the base model."""
    return {key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()}


def injected(model: nn.Module, config: DiabloConfig, state: dict[str, Any]) -> nn.Module:
    model = inject_adapter_in_model(config, model, state_dict=state)
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    return model


def quietly(act: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return act()


@pytest.fixture
def source() -> nn.Module:
    return fill(get_peft_model(llama(), DiabloConfig(num_blocks=4, target_modules=TWO))).eval()


def test_a_state_dict_that_says_what_the_settings_say(source):
    model = quietly(lambda: injected(llama(), DiabloConfig(num_blocks=4, target_modules=TWO), state_of(source)))
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize("target_modules", [["q_proj"], [], ["up_proj", "q_proj"], "all-linear"], ids=str)
def test_the_state_dict_counts_where_the_settings_name_other_targets(source, target_modules):
    config = DiabloConfig(num_blocks=4, target_modules=target_modules)
    with pytest.warns(RuntimeWarning, match="inconsistency was discovered"):
        model = injected(llama(), config, state_of(source))
    assert tuner_layers(model).keys() == tuner_layers(source).keys()
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize("build", [llama, mlp])
def test_settings_without_targets_get_those_of_the_state_dict(build):
    # Of an Mlp no default targets are known.
    kind = "o_proj" if build is llama else "up"
    source = fill(get_peft_model(build().double(), DiabloConfig(num_blocks=4, target_modules=[kind]))).eval()
    config = DiabloConfig(num_blocks=4)
    model = quietly(lambda: injected(build().double(), config, state_of(source)))
    assert config.target_modules == tuner_layers(source).keys()
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_model_that_was_compiled(source, prefix):
    state = {f"{prefix}{key}": value for key, value in state_of(source).items()}
    compiled = torch.compile(llama(), backend="eager")
    model = quietly(
        lambda: inject_adapter_in_model(DiabloConfig(num_blocks=4, target_modules=TWO), compiled, state_dict=state)
    )
    set_peft_model_state_dict(model, {f"_orig_mod.{key}": value for key, value in state_of(source).items()})
    assert tuner_layers(model._orig_mod).keys() == tuner_layers(source).keys()
    torch.testing.assert_close(output(model), output(source))
    # Also where nothing but the keys says it.
    config = DiabloConfig(num_blocks=4)
    inject_adapter_in_model(config, torch.compile(llama(), backend="eager"), state_dict=state)
    assert config.target_modules == tuner_layers(source).keys()


def test_the_number_of_blocks_is_that_of_the_state_dict(source, tmp_path):
    config = DiabloConfig(num_blocks=2, block_pattern={"o_proj": 8}, target_modules=TWO)
    with pytest.warns(RuntimeWarning, match=r"num_blocks=4 for .* where the settings say 2, 8: the state_dict counts"):
        model = injected(llama(), config, state_of(source))
    assert torch.equal(output(model), output(source))
    # Settings that are saved with these blocks have to fit them.
    assert (config.num_blocks, config.block_pattern) == (4, {})


def test_numbers_of_blocks_that_differ_go_into_the_settings():
    several = DiabloConfig(num_blocks=4, block_pattern={"layers.0.self_attn.o_proj": 8}, target_modules=TWO)
    source = fill(get_peft_model(llama(), several)).eval()
    config = DiabloConfig(num_blocks=4, block_pattern={"o_proj": 2, "no_such": 16}, target_modules=TWO)
    with pytest.warns(RuntimeWarning) as caught:
        model = injected(llama(), config, state_of(source))
    words = " ".join(str(warning.message) for warning in caught)
    assert "no blocks for no_such of block_pattern" in words
    assert "num_blocks=4, 8 for" in words
    assert torch.equal(output(model), output(source))
    again = get_peft_model(llama(), config).eval()
    quietly(lambda: set_peft_model_state_dict(again, get_peft_model_state_dict(source)))
    assert torch.equal(output(again), output(source))


def test_of_several_numbers_that_give_one_shape_it_is_that_of_the_settings():
    # 9 and 10 blocks of 11 x 11 are of 2 x 2, and 6 of them are stored.
    case = Case("eleven", lambda: mlp((11, 11, 11)), ("up",), num_blocks=9)
    source = case.adapted()
    config = case.config(num_blocks=10)
    model = quietly(lambda: injected(case.base(), config, state_of(source)))
    assert torch.equal(output(model), output(source))
    assert config.num_blocks == 10


def test_values_need_not_be_tensors():
    config = DiabloConfig(num_blocks=2, target_modules=["up"])
    model = quietly(lambda: inject_adapter_in_model(config, mlp(), state_dict={"up.diablo_blocks": None}))
    assert model.up.diablo_layout["default"].num_blocks == 2


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "initializer_range": 0.3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def test_parameters_that_are_adapted_by_themselves_are_named_by_the_keys():
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    source = fill(get_peft_model(mixtral(), DiabloConfig(num_blocks=4, **settings, init_weights=False)), "none").eval()
    state = state_of(source)
    config = DiabloConfig(num_blocks=4)
    with pytest.warns(RuntimeWarning, match="inconsistency was discovered"):
        model = injected(mixtral(), config, state)
    assert isinstance(model.model.layers[0].mlp.experts, DiabloParameters)
    assert torch.equal(output(model), output(source))
    assert not torch.equal(output(model), output(mixtral()))
    assert config.target_parameters == ["model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match=r"target_parameters=\['x'\] cannot be combined with a state_dict"):
        inject_adapter_in_model(DiabloConfig(num_blocks=4, target_parameters=["x"]), mixtral(), state_dict=state)


def test_keys_that_match_no_module_are_left_out(source):
    state = state_of(source)
    config = DiabloConfig(num_blocks=4, target_modules=TWO)
    strays = {"model.layers.7.self_attn.q_proj.diablo_blocks": torch.ones(4, 4, 4), "score.weight": torch.ones(2)}
    with pytest.warns(RuntimeWarning, match=r"has blocks for model\.layers\.7\.self_attn\.q_proj, which match no"):
        model = inject_adapter_in_model(config, llama(), state_dict=state | strays)
    set_peft_model_state_dict(model, state)
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({}, ValueError, "has keys for none, which match no module of LlamaForCausalLM"),
        ({"base_model.model.x.diablo_blocks": torch.ones(2, 2, 2)}, ValueError, "keys for base_model.model.x, which"),
        ({"model.norm.diablo_blocks": torch.ones(2, 2, 2)}, TypeError, "also match model.norm .*: take its keys out"),
        (
            {"model.layers.1.self_attn.q_proj.diablo_blocks": torch.ones(3, 2, 2)},
            ValueError,
            r"q_proj: \(in_features=16, out_features=16\) takes no blocks of the shape \(3, 2, 2\): they are of",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_leaves_the_model_as_it_was(state, error, words):
    model = llama()
    with pytest.raises(error, match=words):
        inject_adapter_in_model(DiabloConfig(num_blocks=4, target_modules=TWO), model, state_dict=state)
    assert not tuner_layers(model)
    assert_same_bits(base_weights(model), base_weights(llama()))


def test_a_second_adapter_from_a_state_dict_leaves_the_first_as_it_is(source):
    model = inject_adapter_in_model(DiabloConfig(num_blocks=2, target_modules=["q_proj"]), llama())
    state = state_of(source)
    inject_adapter_in_model(DiabloConfig(num_blocks=4), model, adapter_name="second", state_dict=state)
    set_peft_model_state_dict(model, state, adapter_name="second")
    for name, layer in tuner_layers(model).items():
        assert layer.diablo_layout["second"].num_blocks == 4
        assert ("default" in layer.diablo_layout) == name.endswith("q_proj")
        layer.set_adapter("second")
    torch.testing.assert_close(output(model), output(source))
