"""Adapters over a base model that a quantization library holds: each library that is installed and runs on a CPU."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from diablo import DiabloConfig, DiabloQuantizedLinear, hotswap_adapter, preview_targets, suggested_learning_rate

pytest.importorskip("peft.utils.quantization_utils", reason="PEFT before 0.20 has no quantization backends")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Merging into a weight of"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
]


def bnb_4bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def bnb_4bit_double() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)


def bnb_8bit() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def hqq() -> None:
    pytest.importorskip("hqq")


def torchao() -> TorchAoConfig:
    pytest.importorskip("torchao")
    if Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT 0.20 imports what torchao 0.18 no longer has")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


LIBRARIES = [bnb_4bit, bnb_4bit_double, bnb_8bit, hqq, torchao]
every_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        # With 4 blocks both sizes divide, with 5 neither does.
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def with_hqq_layers(model: nn.Module) -> nn.Module:
    """transformers 5 cannot load a model with HQQ yet: its layers are put in by hand."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            settings = BaseQuantizeConfig(nbits=4, group_size=64)
            layer = HQQLinear(copy.deepcopy(module), settings, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(name, layer)
    return model


def quantized(folder, library) -> nn.Module:
    settings = library()
    if settings is None:
        return with_hqq_layers(LlamaForCausalLM.from_pretrained(folder).eval())
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    ).eval()


def config(num_blocks: int = 5) -> DiabloConfig:
    return DiabloConfig(num_blocks=num_blocks, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"diablo_blocks.{adapter_name}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(folder, library, num_blocks: int = 5) -> PeftModel:
    return fill(get_peft_model(quantized(folder, library), config(num_blocks))).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(28).view(2, 14)).logits.float()


def layers(model: nn.Module) -> list[DiabloQuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, DiabloQuantizedLinear)]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@every_library
def test_a_new_adapter_leaves_the_output_as_it_was_and_a_filled_one_adds_its_product(folder, library):
    base = quantized(folder, library)
    plain = output(base)
    model = get_peft_model(base, config())
    assert len(layers(model)) == 8
    assert torch.equal(output(model), plain)
    fill(model)
    assert difference(output(model), plain) > 1e-2
    layer = layers(model)[0]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer.get_base_layer()(x).float() + x @ layer.get_delta_weight("default").T
        torch.testing.assert_close(layer(x).float(), expected, rtol=2e-3, atol=2e-3)
    with model.disable_adapter():
        assert torch.equal(output(model), plain)


@every_library
def test_training_lowers_the_loss_and_moves_the_blocks_alone(folder, library):
    model = get_peft_model(quantized(folder, library), config()).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("diablo_blocks" in name for name in trained)
    plain = output(model.eval())
    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = torch.arange(28).view(2, 14)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all((p != 0).any() for p in trained.values())
    with model.eval().disable_adapter():
        assert difference(output(model), plain) < 1e-5


@every_library
def test_the_suggested_learning_rate_is_that_over_the_plain_weights(folder, library):
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config())
    expected = suggested_learning_rate(plain)
    assert suggested_learning_rate(adapted(folder, library)) == pytest.approx(expected, rel=0.1)


@every_library
def test_an_evaluation_does_not_change_the_gradients_after_it(folder, library):
    model = adapted(folder, library).train()
    ids = torch.arange(28).view(2, 14)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    expected = gradients()
    output(model.eval())
    model.train()
    assert difference(gradients(), expected) < 1e-5
    assert expected.abs().max() > 1e-3


def test_a_base_that_was_evaluated_on_its_own_trains_and_merges_right_or_not_at_all(folder):
    base = quantized(folder, bnb_4bit)
    plain = output(base)
    model = get_peft_model(base, config()).eval()
    assert torch.equal(output(model), plain)
    if not hasattr(base.model.layers[0].self_attn.k_proj.weight.quant_state, "packing_format_for_cpu"):
        pytest.skip("bitsandbytes does not rearrange weights on this CPU")
    with pytest.raises(RuntimeError, match="add the adapter before the first evaluation"):
        model.train()
    with pytest.raises(RuntimeError, match="add the adapter before the first evaluation"):
        model.merge_adapter()


@every_library
@pytest.mark.parametrize("evaluated_before", [False, True])
def test_merging_stays_within_the_libraries_rounding_and_unmerging_is_exact(folder, library, evaluated_before):
    model = adapted(folder, library)
    layer = layers(model)[0]
    if evaluated_before:
        output(model)
    dequantized = layer._dequantized()
    expected = dequantized.float() + layer.get_delta_weight("default")
    original = layer.get_base_layer()
    with pytest.warns(UserWarning, match="quantizes it again"):
        model.merge_adapter()
    merged = layer._dequantized().float()
    bits = 8 if library in (bnb_8bit, torchao) else 4
    assert difference(merged, expected) < {8: 0.02, 4: 0.15}[bits]
    # The update itself has arrived: what is left is smaller than it by far.
    assert difference(merged, expected) < 0.5 * difference(dequantized.float(), expected)
    model.unmerge_adapter()
    assert layer.get_base_layer() is original
    assert torch.equal(layer._dequantized(), dequantized)


@every_library
def test_safe_merge_refuses_values_that_are_not_finite(folder, library):
    model = adapted(folder, library)
    before = layers(model)[0]._dequantized()
    for layer in layers(model):
        layer.diablo_blocks["default"].data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0]._dequantized(), before)
    assert not layers(model)[0].merged


@every_library
def test_two_adapters_merge_and_a_deleted_one_leaves(folder, library):
    model = adapted(folder, library, num_blocks=4)
    model.add_adapter("other", config())
    fill(model, "other", seed=4)
    model.merge_adapter(["default"])
    only = layers(model)[0]._dequantized()
    model.merge_adapter(["other"])
    assert not torch.equal(layers(model)[0]._dequantized(), only)
    model.delete_adapter("other")
    assert torch.equal(layers(model)[0]._dequantized(), only)


@every_library
def test_what_is_not_merged_is_added_beside_the_weight_that_is_quantized_again(folder, library):
    model = adapted(folder, library, num_blocks=4)
    model.add_adapter("other", config())
    fill(model, "other", seed=4)
    only = output(model)
    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    model.merge_adapter(["default"])
    assert difference(output(model), both) < 0.5 * difference(only, both)
    model.unmerge_adapter()
    assert torch.equal(output(model), both)


@every_library
def test_merge_and_unload_and_unload(folder, library):
    model = adapted(folder, library)
    unmerged = output(model)
    # bitsandbytes' kernel for plain models, of another precision, is not used under adapters.
    with model.disable_adapter():
        plain = output(model)
    unloaded = copy.deepcopy(model).unload()
    assert difference(output(unloaded), plain) < 1e-5
    merged = model.merge_and_unload()
    assert not layers(merged)
    assert difference(output(merged), unmerged) < 0.5 * difference(plain, unmerged)


@every_library
def test_saving_loading_and_swapping(folder, library, tmp_path):
    model = adapted(folder, library)
    model.save_pretrained(tmp_path)
    assert all(key.endswith(".diablo_blocks") for key in load_file(tmp_path / "adapter_model.safetensors"))
    expected = output(model)
    loaded = PeftModel.from_pretrained(quantized(folder, library), tmp_path)
    assert torch.equal(output(loaded), expected)
    other = fill(get_peft_model(quantized(folder, library), config()), seed=9).eval()
    hotswap_adapter(other, tmp_path)
    assert torch.equal(output(other), expected)


@every_library
def test_default_targets_and_the_preview_know_quantized_layers(folder, library):
    preview = preview_targets(quantized(folder, library), DiabloConfig(num_blocks=4))
    assert {target.kind for target in preview.targets} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


@every_library
def test_an_adapted_layer_shows_what_the_quantized_one_has(folder, library):
    for layer in layers(adapted(folder, library)):
        base_layer = layer.get_base_layer()
        names = vars(base_layer).keys() - set(dir(nn.Module()))
        assert "in_features" in names
        for name in names:
            assert name.startswith("_") or getattr(layer, name) == getattr(base_layer, name), name


@every_library
def test_rows_with_different_adapters_equal_each_row_alone(folder, library):
    model = adapted(folder, library)
    ids = torch.arange(28).view(2, 14)
    with torch.no_grad(), warnings.catch_warnings():
        mixed = model(input_ids=ids, adapter_names=["default", "__base__"]).logits
        alone = model(input_ids=ids[:1]).logits
        with model.disable_adapter():
            base = model(input_ids=ids[1:]).logits
    torch.testing.assert_close(mixed[:1], alone, rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(mixed[1:], base, rtol=5e-2, atol=5e-2)


def test_a_layer_that_is_moved_while_merged_is_unmerged_where_it_is_now(folder):
    # The one library whose layers move to the only other device that every machine has.
    model = get_peft_model(quantized(folder, torchao), config())
    model.merge_adapter()
    layer = next(module for module in model.modules() if isinstance(module, DiabloQuantizedLinear))
    layer.to("meta")
    layer.unmerge()
    assert {tensor.device.type for tensor in layer.parameters()} == {"meta"}


def test_a_library_that_cannot_quantize_again_trains_and_refuses_to_merge(folder):
    """PEFT's own access to GPTQ, AWQ and others is of this class; those libraries do not run on this CPU."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    pytest.importorskip("bitsandbytes")
    model = get_peft_model(quantized(folder, bnb_4bit), config())
    layer = next(module for module in model.modules() if isinstance(module, DiabloQuantizedLinear))
    layer.quantization_backend = ForwardOnlyQuantizationBackend("gptq")
    before = layer(torch.ones(1, layer.in_features))
    before.sum().backward()
    assert layer.diablo_blocks["default"].grad.abs().sum() > 0
    with pytest.raises(ValueError, match="gptq has quantized cannot be merged into"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer(torch.ones(1, layer.in_features)), before)
