"""Swapping an adapter's values in place, by our function and by PEFT's."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter as hotswap_by_peft
from safetensors.torch import load_file, save_file
from tiny_models import (
    CASES,
    LargestAllocation,
    assert_close,
    assert_same_bits,
    assert_same_output,
    backward,
    base_weights,
    fill,
    mlp,
    output,
    tuner_layers,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MixtralConfig, MixtralForCausalLM
from versions import not_on_oldest_peft

from diablo import DiabloConfig, hotswap_adapter

FILE = "adapter_model.safetensors"
BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def by_peft(model, folder, adapter_name="default"):
    hotswap_by_peft(model, str(folder), adapter_name, torch_device="cpu")


by_both = pytest.mark.parametrize("swap", [hotswap_adapter, by_peft])


@every_case
@pytest.mark.parametrize("merged", [False, True])
@by_both
def test_swapping_gives_the_saved_adapters_output(case, merged, swap, second):
    folder, expected = second(case)
    model = case.adapted(torch.float32)
    before = base_weights(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    if merged:
        model.merge_adapter()
        expected.merge_adapter()
    swap(model, folder)
    assert torch.equal(output(model), output(expected))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    if merged:
        model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)


@pytest.mark.parametrize("merged", [False, True])
def test_swapping_allocates_no_tensor_of_a_weights_size(merged, second):
    case = BY_NAME["mlp"]
    folder, _ = second(case)
    model = case.adapted(torch.float32)
    if merged:
        model.merge_adapter()
    with LargestAllocation() as allocations:
        hotswap_adapter(model, folder)
    # What is read from the file is not counted.
    assert allocations.largest == 0


@pytest.mark.parametrize("merged", [False, True])
@by_both
def test_swapping_under_compile_does_not_compile_again(merged, swap, second):
    torch._dynamo.reset()
    case = BY_NAME["ragged"]
    folder, expected = second(case)
    model = case.adapted(torch.float32)
    if merged:
        model.merge_adapter()
        expected.merge_adapter()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    inputs = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = compiled(inputs)
        frames = counter.frame_count
        assert frames > 0
        swap(compiled, folder)
        second_output = compiled(inputs)
        assert counter.frame_count == frames
        assert_close(second_output, expected(inputs), 1e-5)
    assert (second_output - first).abs().max() > 1e-2


def change_settings(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@not_on_oldest_peft
def test_an_adapter_that_does_not_fit_is_not_swapped_in(second, tmp_path):
    case = BY_NAME["mlp"]
    model = case.adapted(torch.float32)
    before = output(model)
    folder, _ = second(case, num_blocks=8)
    # Its settings are of others than its tensors.
    change_settings(folder, num_blocks=4)
    with pytest.raises(ValueError, match=r"up.diablo_blocks is \(8, 2, 3\), where \(4, 4, 6\) is needed"):
        hotswap_adapter(model, folder)
    folder, _ = second(case, target_modules=["up"])
    with pytest.raises(ValueError, match=r"down.diablo_blocks is missing"):
        hotswap_adapter(model, folder)
    with pytest.raises(ValueError, match="no adapter 'third'; it has default"):
        hotswap_adapter(model, folder, "third")
    with pytest.raises(TypeError, match="takes a PeftModel, got a Mlp"):
        hotswap_adapter(mlp(), folder)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        hotswap_adapter(model, tmp_path / "nowhere")
    get_peft_model(mlp(), LoraConfig(target_modules=["up", "down"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(TypeError, match="LORA"):
        hotswap_adapter(model, tmp_path / "lora")
    assert torch.equal(output(model), before)


@every_case
@pytest.mark.parametrize("merged", [False, True])
@by_both
def test_an_adapter_of_other_sizes_is_swapped_in_and_saved_as_what_it_is(case, merged, swap, second, tmp_path):
    folder, expected = second(case, num_blocks=case.other_num_blocks)
    model = case.adapted(torch.float32)
    before = base_weights(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    # What the first pass has prepared is of the old sizes.
    output(model)
    if merged:
        model.merge_adapter()
        expected.merge_adapter()
    swap(model, folder)
    assert torch.equal(output(model), output(expected))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    if merged:
        model.unmerge_adapter()
        expected.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
    assert model.peft_config["default"].num_blocks == case.other_num_blocks
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(case.base(torch.float32), tmp_path / "again").eval()
    assert_same_output(output(loaded), output(expected))


@by_both
def test_a_block_pattern_follows_and_the_model_card_too(swap, second, tmp_path):
    case = BY_NAME["llama"]
    folder, expected = second(case, block_pattern={"v_proj": 2, "layers.1.mlp.up_proj": 8})
    model = case.adapted(torch.float32)
    swap(model, folder)
    assert torch.equal(output(model), output(expected))
    model.save_pretrained(tmp_path / "again")
    config, first = (json.loads((own / "adapter_config.json").read_text()) for own in (tmp_path / "again", folder))
    assert config["block_pattern"] == first["block_pattern"] == {"v_proj": 2, "layers.1.mlp.up_proj": 8}
    trained = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert f"{trained:,} parameters" in (tmp_path / "again" / "README.md").read_text()


@every_case
def test_an_adapter_of_other_sizes_is_trained_on(case, second):
    folder, expected = second(case, num_blocks=case.other_num_blocks)
    model = case.adapted(torch.float32)
    backward(model)
    hotswap_adapter(model, folder)
    backward(model)
    backward(expected)
    for name, layer in tuner_layers(expected).items():
        gradient = tuner_layers(model)[name].diablo_blocks["default"].grad
        assert_close(gradient, layer.diablo_blocks["default"].grad, 1e-5)


@by_both
@not_on_oldest_peft
@pytest.mark.parametrize("num_blocks", [4, 3])
def test_of_two_adapters_whose_names_begin_alike_one_is_swapped(swap, num_blocks, second):
    case = BY_NAME["llama"]
    folder, expected = second(case, num_blocks=num_blocks)
    model = get_peft_model(case.base(torch.float32), case.config(), adapter_name="foo")
    fill(model, "foo")
    for name in ("foobar", "bar"):
        model.add_adapter(name, case.config())
        fill(model, name, seed=5)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    swap(model, folder, "foo")
    model.set_adapter("foo")
    assert_same_output(output(model), output(expected))
    changed = {name for name, value in model.state_dict().items() if not same(value, before[name])}
    assert changed == {name for name in before if name.endswith("diablo_blocks.foo")}


def same(value, other):
    return value.shape == other.shape and torch.equal(value, other)


@by_both
@not_on_oldest_peft
def test_modules_that_are_saved_whole_are_swapped_too(swap, second):
    case = BY_NAME["mlp"]
    settings = {"modules_to_save": ["head"], "bias": "diablo_only"}
    folder, _ = second(case, **settings)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(8)
    save_file({key: torch.randn(value.shape, generator=generator) for key, value in tensors.items()}, folder / FILE)
    model = case.adapted(torch.float32, **settings)
    swap(model, folder)
    expected = PeftModel.from_pretrained(case.base(torch.float32), folder).eval()
    assert_same_output(output(model), output(expected))
    assert any("head" in key for key in tensors)
    assert any(key.endswith("bias") for key in tensors)


@by_both
@pytest.mark.parametrize("num_blocks", [4, 3])
def test_fused_experts_are_swapped(swap, num_blocks, tmp_path):
    def adapted(seed, num_blocks):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
        base = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=3, **sizes))
        config = DiabloConfig(num_blocks=num_blocks, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        model = get_peft_model(base, config).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".diablo_blocks." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    saved, model = adapted(1, num_blocks), adapted(2, 4)
    saved.save_pretrained(tmp_path)
    output(model)
    swap(model, tmp_path)
    assert torch.equal(output(model), output(saved))


def compiled_outside(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_by_layer(model):
    layers = model.base_model.model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="eager")
    return model


@by_both
@pytest.mark.parametrize("compiling", [compiled_outside, compiled_in_place, compiled_by_layer])
def test_a_compiled_model_takes_adapters_of_its_sizes_alone(swap, compiling, second):
    case = BY_NAME["llama"]
    folder, expected = second(case)
    model = case.adapted(torch.float32)
    compiled = compiling(model)
    swap(compiled, folder)
    assert_same_output(output(model), output(expected))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder, _ = second(case, num_blocks=2)
    with pytest.raises(ValueError, match=r"num_blocks=2 where 'default' has 4, and the model is compiled"):
        swap(compiled, folder)
    assert_same_bits(model.state_dict(), before)


@by_both
def test_an_adapter_of_other_replicated_layers_is_not_swapped_in(swap, second):
    case = BY_NAME["llama"]
    folder, _ = second(case, layer_replication=[(0, 2), (0, 1)])
    model = case.adapted(torch.float32, layer_replication=[(0, 1), (0, 2)])
    with pytest.raises(ValueError, match=r"layer_replication=\[\(0, 2\), \(0, 1\)\] and the model has"):
        swap(model, folder)
    folder, expected = second(case, layer_replication=[(0, 1), (0, 2)], num_blocks=2)
    swap(model, folder)
    assert torch.equal(output(model), output(expected))


@not_on_oldest_peft
def test_peft_swaps_adapters_of_lora_as_before(tmp_path):
    saved, model = (get_peft_model(mlp(), LoraConfig(r=2, target_modules=["up"])).eval() for _ in range(2))
    nn.init.normal_(saved.base_model.model.up.lora_B["default"].weight)
    saved.save_pretrained(tmp_path)
    assert not torch.equal(output(model), output(saved))
    by_peft(model, tmp_path)
    assert torch.equal(output(model), output(saved))


@not_on_oldest_peft
def test_peft_does_not_swap_an_adapter_of_another_method_in(second, tmp_path):
    case = BY_NAME["mlp"]
    folder, _ = second(case)
    lora = get_peft_model(mlp(), LoraConfig(target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and DIABLO"):
        by_peft(lora, folder)
    with pytest.raises(TypeError, match=r"'default' is of PeftType\.LORA; only DiaBlo's can be overwritten"):
        hotswap_adapter(lora, folder)
