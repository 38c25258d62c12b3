"""Adapted embeddings of language models, and adapters that are loaded onto a base of another dtype."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import assert_same_output, fill, llama, output, tuner_layers
from torch import nn
from versions import not_on_oldest_peft

from diablo import DiabloConfig

CONFIG = {"num_blocks": 4, "target_modules": ["embed_tokens", "q_proj"]}


@pytest.mark.parametrize("save_embedding_layers", [True, False])
def test_an_adapted_embedding_is_saved_with_or_without_its_base(save_embedding_layers, tmp_path):
    model = fill(get_peft_model(llama(), DiabloConfig(**CONFIG)))
    model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("embed_tokens.base_layer" in key for key in keys) == save_embedding_layers
    assert_same_output(output(PeftModel.from_pretrained(llama(), tmp_path)), output(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_loads_onto_a_base_of_another_dtype(dtype, autocast, tmp_path):
    model = fill(get_peft_model(llama(), DiabloConfig(**CONFIG)), std=0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(llama().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
    kept = {torch.bfloat16, torch.float16}
    expected = torch.float32 if autocast and dtype in kept else dtype
    assert {layer.diablo_blocks["default"].dtype for layer in tuner_layers(loaded).values()} == {expected}
    got, exact = output(loaded), output(model)
    assert got.dtype == dtype
    assert (got.double() - exact.double()).norm() < (0.05 if dtype in kept else 1e-5) * exact.double().norm()
    assert (exact - output(llama())).norm() > 0.1 * exact.norm()


@not_on_oldest_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_that_are_cast_are_trained_only_where_they_were(dtype, tmp_path):
    def trained(model: nn.Module, adapter_name: str = "default") -> set[bool]:
        return {layer.diablo_blocks[adapter_name].requires_grad for layer in tuner_layers(model).values()}

    model = get_peft_model(llama().to(dtype), DiabloConfig(**CONFIG))
    model.add_adapter("inactive", DiabloConfig(**CONFIG))
    assert (trained(model), trained(model, "inactive")) == ({True}, {False})
    model.save_pretrained(tmp_path, selected_adapters=["default"], save_embedding_layers=False)
    assert trained(PeftModel.from_pretrained(llama().to(dtype), tmp_path)) == {False}
    assert trained(PeftModel.from_pretrained(llama().to(dtype), tmp_path, is_trainable=True)) == {True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_of_a_trained_model_are_had_again_to_the_bit_by_is_trainable_and_by_merging(dtype, tmp_path):
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model = get_peft_model(llama().to(dtype), DiabloConfig(num_blocks=4, target_modules=targets))
    optimizer = torch.optim.AdamW([blocks for blocks in model.parameters() if blocks.requires_grad], 0.05)
    tokens = torch.arange(2, 16).view(2, 7)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    trained = output(model)

    def loaded(**settings) -> nn.Module:
        return PeftModel.from_pretrained(llama().to(dtype), tmp_path, **settings).eval()

    assert torch.equal(output(loaded(is_trainable=True)), trained)
    assert torch.equal(output(loaded().merge_and_unload()), trained)
    merged = loaded()
    merged.merge_adapter()
    assert torch.equal(output(merged), trained)
    # Beside the weight, rounding is another: of the output, and not of the weight.
    beside = output(loaded())
    assert not torch.equal(beside, trained)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (beside.double() - trained.double()).norm() < tolerance * trained.double().norm()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), "Conv2d of 2 groups"),
        (nn.ConvTranspose1d(4, 8, 3), "ConvTranspose1d"),
        (nn.Embedding(8, 4, max_norm=1.0), "max_norm"),
        (nn.LSTM(4, 8), "weight_ih_l0, weight_hh_l0 in target_parameters"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kinds_that_are_not_supported_say_why(module, words):
    with pytest.raises(TypeError, match=words):
        get_peft_model(nn.ModuleDict({"it": module}), DiabloConfig(num_blocks=2, target_modules=["it"]))
