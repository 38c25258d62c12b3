"""Parameters that are adapted by themselves: the fused experts of mixtures, and matrices that no linear layer holds."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import assert_close, assert_same_bits, base_weights, block_entries, output
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from diablo import DiabloConfig, DiabloParameters, hotswap_adapter, preview_targets

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FILE = "adapter_model.safetensors"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    # Not divisible by the number of blocks, but by what torch's grouped product asks for.
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


def mixtral(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_hidden_layers=layers)).eval()


def gpt_oss(layers: int = 2) -> nn.Module:
    """Its experts hold their matrices as (experts, in, out)."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_hidden_layers=layers, head_dim=4)).eval()


every_mixture = pytest.mark.parametrize("build", [mixtral, gpt_oss])


def config(**settings) -> DiabloConfig:
    return DiabloConfig(**{"num_blocks": 5, "target_parameters": EXPERTS, **settings})


def fill(model: nn.Module, adapter_name: str = "default", seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"diablo_blocks.{adapter_name}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapted(build, **settings) -> PeftModel:
    return fill(get_peft_model(build(), config(**settings))).eval()


def layers(model: nn.Module) -> dict[str, DiabloParameters]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DiabloParameters)}


def with_dense_delta(build, model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """The base model with the update of each expert added entry by entry, from the paper's definition."""
    dense = build()
    for name, layer in layers(model).items():
        plain = dense.get_submodule(name.removeprefix("base_model.model."))
        for weight_name, blocks in layer.blocks_of(adapter_name).items():
            weight = getattr(plain, weight_name).data
            view = weight if build is gpt_oss else weight.transpose(1, 2)
            assert blocks.shape[0] == len(weight) == 3, "each expert has blocks of its own"
            for index, i, o in block_entries(blocks.shape[1:], *view.shape[1:]):
                view[:, i, o] += blocks.detach()[(slice(None), *index)]
    return dense


@every_mixture
def test_a_new_adapter_changes_nothing_and_only_blocks_are_trained(build):
    model = get_peft_model(build(), config())
    assert torch.equal(output(model), output(build()))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    assert all(".mlp.experts.diablo_blocks.default." in name for name in names)
    before = base_weights(model)
    model(input_ids=torch.arange(14).view(2, 7)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert_same_bits(base_weights(model), before)
    assert not torch.equal(output(model), output(build()))


@every_mixture
def test_the_output_is_that_of_the_experts_with_the_dense_update_added(build):
    model = adapted(build)
    assert (output(model) - output(build())).abs().max() > 1e-2
    torch.testing.assert_close(output(model), output(with_dense_delta(build, model)), rtol=1e-4, atol=1e-4)


@every_mixture
def test_the_gradient_at_zero_is_the_diagonal_of_full_fine_tunings_gradient(build):
    base, model = build(), get_peft_model(build(), config())
    for each in (base, model):
        each(input_ids=torch.arange(14).view(2, 7)).logits.square().sum().backward()
    for name, layer in layers(model).items():
        plain = base.get_submodule(name.removeprefix("base_model.model."))
        for weight_name, blocks in layer.blocks_of("default").items():
            full = getattr(plain, weight_name).grad
            full = full if build is gpt_oss else full.transpose(1, 2)
            expected = torch.zeros_like(blocks)
            for index, i, o in block_entries(blocks.shape[1:], *full.shape[1:]):
                expected[(slice(None), *index)] = full[:, i, o]
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(blocks.grad, expected, rtol=1e-4, atol=1e-4)


@every_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_gives_the_same_output_to_the_bit_and_is_undone_to_the_bit(build, dtype):
    model = fill(get_peft_model(build().to(dtype), config()))
    before, weights = output(model), base_weights(model)
    for _ in range(10):
        model.merge_adapter(safe_merge=True)
        assert torch.equal(output(model), before), "the forward rounds the sum as merging does"
        assert not torch.equal(output(model), output(build().to(dtype)))
        model.unmerge_adapter()
        assert_same_bits(base_weights(model), weights)
    with model.disable_adapter():
        assert torch.equal(output(model), output(build().to(dtype)))
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert set(plain.state_dict()) == set(build().state_dict())
    assert torch.equal(output(plain), before)


@every_mixture
def test_saving_and_loading(build, tmp_path):
    model = adapted(build)
    model.save_pretrained(tmp_path)
    keys = {key.removeprefix("base_model.model.model.layers.0.mlp.") for key in load_file(tmp_path / FILE)}
    assert {"experts.diablo_blocks.gate_up_proj", "experts.diablo_blocks.down_proj"} <= keys
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(output(loaded), output(model))


def test_several_adapters_are_chosen_added_swapped_and_deleted(tmp_path):
    model = adapted(mixtral)
    first = output(model)
    # Another number of blocks, one parameter less, and linear layers besides.
    model.add_adapter("other", config(num_blocks=2, target_parameters=EXPERTS[:1], target_modules=["q_proj"]))
    fill(model, "other", seed=4)
    assert torch.equal(output(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    model.set_adapter("other")
    assert not torch.equal(output(model), first)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(output(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(output(model), first)
    another = fill(get_peft_model(mixtral(), config()), seed=5)
    another.save_pretrained(tmp_path)
    model.merge_adapter()
    hotswap_adapter(model, tmp_path)
    assert torch.equal(output(model), output(another))


def test_a_weighted_combination_is_exact():
    model = adapted(mixtral)
    model.add_adapter("other", config(target_parameters=EXPERTS[:1]))
    fill(model, "other", seed=4)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "mixed")
    for layer in layers(model).values():
        blocks = {name: layer.blocks_of(name) for name in ("default", "other", "mixed")}
        expected = blocks["default"]["gate_up_proj"] * 0.5 - 2.0 * blocks["other"]["gate_up_proj"]
        assert torch.equal(blocks["mixed"]["gate_up_proj"], expected)
        assert torch.equal(blocks["mixed"]["down_proj"], blocks["default"]["down_proj"] * 0.5)


def test_one_adapter_for_all_rows_is_allowed_and_a_mixture_of_them_is_refused():
    model = adapted(mixtral)
    ids = torch.arange(14).view(2, 7)
    expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, adapter_names=["default"] * 2).logits, expected)
    assert torch.equal(model(input_ids=ids, adapter_names=["__base__"] * 2).logits, mixtral()(input_ids=ids).logits)
    with pytest.raises(ValueError, match="tokens of all rows together"):
        model(input_ids=ids, adapter_names=["default", "__base__"])


def test_filters_and_patterns_hold_for_parameters():
    settings = config(layers_to_transform=[1], block_pattern={r"experts\.down_proj": 2})
    model = get_peft_model(mixtral(), settings)
    ((name, layer),) = layers(model).items()
    assert ".layers.1." in name
    assert {key: layout.num_blocks for key, layout in layer.layouts_of("default").items()} == {
        "gate_up_proj": 5,
        "down_proj": 2,
    }


def test_the_router_is_a_parameter_as_well():
    model = fill(get_peft_model(mixtral(), DiabloConfig(num_blocks=3, target_parameters=["gate.weight"])))
    assert len(layers(model)) == 2
    assert not torch.equal(output(model), output(mixtral()))


def test_the_preview_lists_parameters():
    preview = preview_targets(mixtral(), config(target_parameters=EXPERTS[:1]))
    assert [target.name for target in preview.targets] == [
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)
    ]
    reasons = {skipped.name: skipped.reason for skipped in preview.skipped}
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "not in target_parameters"
    assert "3 x 5 x 4 x 10" in str(preview)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target_parameters": ["experts.gate_proj"]}, ValueError, "gate_proj.*experts.gate_up_proj"),
        ({"target_parameters": [*EXPERTS, "experts.up"]}, ValueError, "target_parameters has experts.up"),
        ({"target_parameters": ["q_proj.weight"]}, TypeError, "name the module in target_modules"),
        ({"target_parameters": ["norm.weight"]}, TypeError, "1 dimensions"),
        (
            {"target_parameters": None, "target_modules": ["experts"]},
            TypeError,
            "gate_up_proj, down_proj in",
        ),
        ({"num_blocks": 17}, ValueError, "at most 16 blocks"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(settings, error, words):
    model = mixtral()
    with pytest.raises(error, match=words):
        get_peft_model(model, config(**settings))
    assert not layers(model)
    assert torch.equal(output(model), output(mixtral()))


def test_a_module_and_its_parameter_cannot_both_be_adapted():
    model = get_peft_model(mixtral(), config())
    before = copy.deepcopy(output(model))
    with pytest.raises(TypeError, match="target_parameters"):
        model.add_adapter("other", DiabloConfig(num_blocks=4, target_modules=["experts"]))
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("settings", [{"diablo_dropout": 0.1}, {"target_parameters": "experts.*"}])
def test_settings_that_parameters_cannot_have(settings):
    with pytest.raises(ValueError, match="target_parameters"):
        config(**settings)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(use_reentrant):
    model = adapted(mixtral).train()

    def gradients():
        model.zero_grad()
        model(input_ids=torch.arange(14).view(2, 7)).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for got, want in zip(gradients(), expected, strict=True):
        assert torch.equal(got, want)


def test_deepcopy_and_pickling_keep_the_output(tmp_path):
    model = adapted(mixtral)
    assert torch.equal(output(copy.deepcopy(model)), output(model))
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(output(torch.load(tmp_path / "model.pt", weights_only=False)), output(model))


def test_a_missing_experts_tensor_is_an_error(tmp_path):
    model = adapted(mixtral)
    model.save_pretrained(tmp_path)
    path = tmp_path / FILE
    tensors = load_file(path)
    gone = next(key for key in tensors if key.endswith("down_proj"))
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match="down_proj"):
        PeftModel.from_pretrained(mixtral(), tmp_path)


@every_mixture
def test_forward_and_backward_under_compile_are_one_graph_and_equal_eager_ones(build):
    model = adapted(lambda: build(layers=1))
    inputs = torch.arange(10).reshape(2, 5)
    blocks = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = model(input_ids=inputs).logits
    wanted = torch.autograd.grad(expected.square().sum(), blocks)
    torch._dynamo.reset()
    # A layer that broke the graph would make the compiler begin again behind it.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(input_ids=inputs).logits
    assert_close(got, expected, 1e-5)
    for one, other in zip(torch.autograd.grad(got.square().sum(), blocks), wanted, strict=True):
        assert_close(one, other, 1e-4)


@every_mixture
@pytest.mark.parametrize("merged", ["default", "other"])
def test_what_is_not_merged_is_added_to_copies_of_merged_parameters(build, merged):
    model = adapted(build)
    model.add_adapter("other", config(num_blocks=4, target_parameters=EXPERTS[:1]))
    fill(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    before = base_weights(model)
    expected = output(model)
    model.merge_adapter([merged])
    assert_close(output(model), expected, 1e-5)
    model.base_model.set_adapter(["default", "other"])
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
