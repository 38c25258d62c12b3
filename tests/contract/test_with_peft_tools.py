"""PEFT's tools around an adapted model: conversion to LoRA, status, pickling."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_model_status,
    get_peft_model,
    save_as_lora,
)
from tiny_models import CASES, LINEAR_CASES, assert_close, fill, output, tuner_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

import diablo

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_case_of_linear_layers = pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)


@every_case_of_linear_layers
def test_conversion_to_lora_is_exact_where_the_rank_is_free_and_is_not_at_rank_one(case, tmp_path):
    model = case.adapted(torch.float32)
    expected, plain = output(model), output(case.base(torch.float32))
    # A rank below 1 is the share of the squared singular values to keep, layer by layer.
    full = 0.9999999
    errors = {}
    for rank in (1, full):
        save_as_lora(tmp_path / str(rank), model, rank=rank)
        lora = PeftModel.from_pretrained(case.base(torch.float32), tmp_path / str(rank))
        errors[rank] = float((output(lora) - expected).norm() / (expected - plain).norm())
    assert errors[full] < 1e-3 < errors[1]


@every_case_of_linear_layers
def test_conversion_to_lora_states_the_best_approximation_of_its_rank(case):
    model = case.adapted(torch.float32)
    rank = 2
    _, factors = convert_to_lora(model, rank=rank)
    for name, layer in tuner_layers(model).items():
        delta = layer.get_delta_weight("default").float()
        a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        product = b @ a if delta.shape == (b.shape[0], a.shape[1]) else (b @ a).T
        values = torch.linalg.svdvals(delta)
        # Eckart and Young: the error of the best approximation is the norm of the singular values left out.
        assert float((delta - product).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-5)


@every_case_of_linear_layers
def test_our_conversion_to_lora_states_its_error_and_is_pefts(case, tmp_path):
    model = case.adapted(torch.float32)
    expected, plain = output(model), output(case.base(torch.float32))
    for rank in (1, 3, 0.9, 1.0):
        conversion = diablo.convert_to_lora(model, rank)
        if not isinstance(rank, float):
            _, factors = convert_to_lora(model, rank=rank)
        squares = total = 0.0
        for name, layer in tuner_layers(model).items():
            delta = layer.get_delta_weight("default").double()
            if isinstance(layer.get_base_layer(), Conv1D):
                delta = delta.T
            product = _product(conversion.state_dict, name)
            error = float((delta - product).norm() / delta.norm())
            assert conversion.relative_errors[name] == pytest.approx(error, abs=2e-6)
            if not isinstance(rank, float):
                # Peer: the best approximation is one and the same, its factors are not.
                assert_close(product, _product(factors, name), 1e-4)
            elif rank < 1:
                assert error**2 <= 1 - rank + 1e-6
                one_less = torch.linalg.svdvals(delta)[conversion.ranks[name] - 1 :].square().sum()
                assert float(one_less / delta.square().sum()) > 1 - rank - 1e-6, (
                    "the rank is no larger than it has to be"
                )
            squares, total = squares + float((delta - product).norm() ** 2), total + float(delta.norm() ** 2)
        assert conversion.relative_error == pytest.approx((squares / total) ** 0.5, abs=2e-6)
        conversion.save_pretrained(tmp_path / str(rank))
        lora = PeftModel.from_pretrained(case.base(torch.float32), tmp_path / str(rank))
        from_the_whole = float((output(lora) - expected).norm() / (expected - plain).norm())
        assert (from_the_whole < 1e-3) == (conversion.relative_error < 1e-3)
    assert conversion.relative_error < 1e-3, "at a share of 1.0 nothing is left out"


def _product(factors, name):
    a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    return b @ a


def test_conversion_keeps_modules_to_save_and_works_without_peft_knowing_diablo(tmp_path):
    case = BY_NAME["llama"]
    model = get_peft_model(case.base(torch.float32), replace(case.config(), modules_to_save=["lm_head"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    diablo.convert_to_lora(model.eval(), 64).save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(case.base(torch.float32), tmp_path)
    assert_close(output(lora), output(model), 1e-4)
    # A narrow layer has less than the rank that was asked for: it is exact at its own.
    assert lora.peft_config["default"].r < 64
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("rank", "match"), [(0, "rank=0"), (-1, "rank=-1"), (1.5, "rank=1.5"), (0.0, "rank=0.0"), (True, "rank=True")]
)
def test_a_rank_out_of_range_is_refused(rank, match):
    with pytest.raises(ValueError, match=match):
        diablo.convert_to_lora(BY_NAME["mlp"].adapted(), rank)


@pytest.mark.parametrize("name", ["conv_2d", "embedding"])
def test_conversion_names_the_layers_that_lora_has_no_factors_for(name):
    with pytest.raises(TypeError, match="Only the updates of linear layers"):
        diablo.convert_to_lora(BY_NAME[name].adapted(), 2)


def test_conversion_of_what_is_not_there_is_refused():
    model = BY_NAME["mlp"].adapted()
    with pytest.raises(ValueError, match="no adapter 'other'"):
        diablo.convert_to_lora(model, 2, "other")
    with pytest.raises(TypeError, match="takes a PeftModel"):
        diablo.convert_to_lora(nn.Linear(3, 3), 2)
    lora = get_peft_model(BY_NAME["mlp"].base(), LoraConfig(target_modules=["up"]))
    with pytest.raises(TypeError, match="only DiaBlo adapters"):
        diablo.convert_to_lora(lora, 2)


@every_case
def test_the_status_of_each_layer_and_of_the_model(case):
    model = case.adapted(torch.float32)
    model.add_adapter("other", case.other_config())
    layers = {status.name.removeprefix("model."): status for status in get_layer_status(model)}
    assert layers.keys() == tuner_layers(model).keys()
    first = layers[next(iter(layers))]
    kinds = {"embedding": "DiabloEmbedding", "vit": "DiabloConv"}
    kind = "DiabloConv" if case.name.startswith("conv_") else kinds.get(case.name, "DiabloLinear")
    assert first.module_type == f"diablo.{kind}"
    assert first.enabled
    assert first.active_adapters == ["default"]
    assert first.merged_adapters == []
    assert first.requires_grad["default"] is True
    assert first.requires_grad.get("other", False) is False
    assert first.devices["default"] == ["cpu"]
    trainable = model.get_nb_trainable_parameters()[0]
    status = get_model_status(model)
    assert status.adapter_model_type == "DiabloModel"
    assert status.peft_types["default"] == "DIABLO"
    assert status.trainable_params == trainable > 0
    assert status.num_adapter_layers == len(layers)
    assert status.available_adapters == ["default", "other"]
    model.merge_adapter(["default"])
    assert get_model_status(model).merged_adapters == ["default"]
    model.base_model.disable_adapter_layers()
    assert get_model_status(model).enabled is False


@every_case
@pytest.mark.parametrize("merged", [False, True])
def test_a_pickled_model_is_equal(case, merged):
    model = case.adapted()
    if merged:
        model.merge_adapter()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(output(twin), output(model))
    twin.unload()
    model.unload()
    assert torch.equal(output(twin), output(model))


def test_a_model_saved_by_torch_loads_in_a_process_that_imports_nothing_first(tmp_path):
    case = BY_NAME["llama"]
    model = case.adapted()
    torch.save(model, tmp_path / "model.pt")
    torch.save(output(model), tmp_path / "output.pt")
    # A pickle names the classes that it needs, whose package registers the method when it is imported.
    code = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "ids = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(input_ids=ids).logits, torch.load(sys.argv[1] + '/output.pt'))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@every_case
def test_a_state_dict_loads_into_a_model_adapted_anew(case):
    model = case.adapted()
    anew = get_peft_model(case.base(), case.config()).eval()
    assert not torch.equal(output(anew), output(model))
    anew.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(anew), output(model))


def test_the_representation_names_the_method_and_the_blocks():
    text = repr(BY_NAME["mlp"].adapted())
    assert "diablo.DiabloLinear" in text
    assert "default: (4, 4, 6)" in text


def test_trainable_parameters_are_printed(capsys):
    fill(BY_NAME["mlp"].adapted()).print_trainable_parameters()
    # 16 x 24 / 4 + 24 x 8 / 4 blocks.
    assert "trainable params: 144 ||" in capsys.readouterr().out
