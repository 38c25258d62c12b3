"""What PEFT's and transformers' verbs have to do with a DiaBlo adapter, on models of every supported kind of layer."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny_models import (
    CASES,
    assert_close,
    assert_same_bits,
    assert_same_output,
    backward,
    base_weights,
    block_entries,
    dense_delta,
    fill,
    gpt2,
    in_and_out_first,
    llama,
    mlp,
    output,
    tuner_layers,
    with_dense_delta,
)
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from versions import saves_biases

from diablo import BlockLayout, DiabloConfig, DiabloLayer

# PEFT warns of each merge on top of another, which is what several tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_language_model = pytest.mark.parametrize("case", [BY_NAME["llama"], BY_NAME["gpt2"]], ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


transformers_takes_this_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="this transformers loads adapters with PEFT 0.20 or newer only"
)


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    """A test that compares outputs of adapters is vacuous where the adapters do not show in the output."""
    assert (a - b).abs().max() > 1e-2


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def layout_of(layer: nn.Module, num_blocks: int) -> BlockLayout:
    in_features, out_features, *kernel = in_and_out_first(layer.get_base_layer().weight, layer.get_base_layer()).shape
    return BlockLayout(in_features, out_features, num_blocks, tuple(kernel))


# The method.


@every_case
def test_a_new_adapter_leaves_the_output_as_it_was_to_the_bit(case):
    base = case.base(torch.float32)
    before = output(base)
    model = get_peft_model(base, case.config())
    assert torch.equal(output(model), before)
    assert_differ(output(fill(model)), before)


@every_case
def test_only_blocks_are_trained_and_a_step_moves_nothing_else(case):
    model = case.adapted()
    layers = tuner_layers(model)
    assert layers
    assert all(name.endswith(".diablo_blocks.default") for name in trainable(model))
    assert len(trainable(model)) == len(layers)
    before = base_weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old_blocks = {name: layer.diablo_blocks["default"].detach().clone() for name, layer in layers.items()}
    backward(model)
    optimizer.step()
    assert_same_bits(base_weights(model), before)
    for name, layer in layers.items():
        assert not torch.equal(layer.diablo_blocks["default"], old_blocks[name]), name


@every_case
def test_the_number_of_trainable_parameters_is_what_the_layouts_say(case):
    model = case.adapted()
    expected = sum(layout_of(layer, case.num_blocks).num_parameters for layer in tuner_layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == expected


@every_case
def test_the_output_is_that_of_the_weights_with_the_dense_update_added(case):
    base = case.base()
    model = fill(get_peft_model(copy.deepcopy(base), case.config()))
    assert_differ(output(model), output(base))
    assert_close(output(model), output(with_dense_delta(base, model)), case.tolerance)


@every_case
def test_the_delta_weight_is_the_dense_update(case):
    for layer in tuner_layers(case.adapted()).values():
        expected = dense_delta(layer.diablo_blocks["default"], layer.get_base_layer())
        assert torch.equal(layer.get_delta_weight("default"), expected)


@every_case
def test_the_gradient_at_zero_is_the_diagonal_of_full_fine_tunings_gradient(case):
    base = case.base()
    model = get_peft_model(copy.deepcopy(base), case.config())
    backward(base)
    backward(model)
    for name, layer in tuner_layers(model).items():
        plain = base.get_submodule(name)
        full = in_and_out_first(plain.weight.grad, plain)
        blocks = layer.diablo_blocks["default"]
        # Entries outside the matrix have no effect, hence no gradient.
        expected = torch.zeros_like(blocks)
        for index, i, o in block_entries(blocks.shape[-3:], *full.shape[:2]):
            expected[(..., *index)] = full[i, o]
        assert expected.abs().max() > 1e-3, name
        assert_close(blocks.grad, expected, case.tolerance)


# Merging.


@every_case
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_does_not_change_the_output(case, safe_merge):
    model = case.adapted()
    before, weights = output(model), base_weights(model)
    model.merge_adapter(safe_merge=safe_merge)
    # Without this, a merge that does nothing would pass.
    changed = [name for name, weight in base_weights(model).items() if not torch.equal(weight, weights[name])]
    assert len(changed) == len(tuner_layers(model))
    assert_close(output(model), before, case.tolerance)


@every_case
@every_dtype
def test_unmerging_restores_the_weights_to_the_bit(case, dtype):
    model = case.adapted(dtype)
    before = base_weights(model)
    for _ in range(1000 if case.name == "ragged" else 10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
    assert not any(layer.merged for layer in tuner_layers(model).values())


@every_case
@every_dtype
def test_unmerging_two_adapters_of_different_sizes_restores_the_weights_to_the_bit(case, dtype):
    model = case.adapted(dtype)
    model.add_adapter("other", case.config(num_blocks=case.other_num_blocks))
    fill(model, "other", seed=4)
    before = base_weights(model)
    for cycle in range(50 if case.name == "ragged" else 10):
        model.merge_adapter(["default", "other"][:: 1 if cycle % 2 else -1][:1])
        once = base_weights(model)
        model.merge_adapter(["default", "other"])
        assert all(set(layer.merged_adapters) == {"default", "other"} for layer in tuner_layers(model).values())
        assert any(not torch.equal(weight, once[name]) for name, weight in base_weights(model).items())
        model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)


@every_case
def test_two_merged_adapters_add_up(case):
    base = case.base()
    model = fill(get_peft_model(copy.deepcopy(base), case.config()))
    model.add_adapter("other", case.other_config())
    fill(model, "other", seed=4)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert_close(output(model), output(with_dense_delta(base, model, ("default", "other"))), case.tolerance)


@every_dtype
def test_a_merged_weight_is_the_sum_rounded_once(dtype):
    case = BY_NAME["ragged"]
    base = case.base(dtype)
    model = fill(get_peft_model(copy.deepcopy(base), case.config()))
    model.merge_adapter()
    for name, layer in tuner_layers(model).items():
        weight = base.get_submodule(name).weight.detach()
        delta = dense_delta(layer.diablo_blocks["default"], base.get_submodule(name))
        # Low precisions are summed in float32; a float64 weight must not pass through float32 on the way.
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(layer.get_base_layer().weight, (weight.to(wide) + delta.to(wide)).to(dtype)), name


@every_dtype
def test_a_merged_weight_of_two_adapters_is_rounded_once(dtype):
    case = BY_NAME["ragged"]
    base = case.base(dtype)
    model = fill(get_peft_model(copy.deepcopy(base), case.config()))
    model.add_adapter("other", case.config())
    fill(model, "other", seed=4)
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    wide = torch.promote_types(dtype, torch.float32)
    for name, layer in tuner_layers(model).items():
        plain = base.get_submodule(name)
        delta = dense_delta(layer.diablo_blocks["default"].to(wide) + layer.diablo_blocks["other"].to(wide), plain)
        assert torch.equal(layer.get_base_layer().weight, (plain.weight.to(wide) + delta).to(dtype)), name


@every_case
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_refuses_values_that_are_not_finite(case, broken):
    model = case.adapted(torch.float32)
    before = base_weights(model)
    # In every layer, so that it does not matter which one PEFT comes to first.
    for layer in tuner_layers(model).values():
        layer.diablo_blocks["default"].data[0, 0, 0] = broken
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(base_weights(model), before)
    assert not any(layer.merged for layer in tuner_layers(model).values())
    # The break is in the blocks, not in the check: an unsafe merge takes it.
    model.merge_adapter()
    assert any(not torch.isfinite(weight).all() for weight in base_weights(model).values())


def test_a_refused_second_merge_leaves_the_first_in_place():
    case = BY_NAME["ragged"]
    model = case.adapted(torch.float32)
    before = base_weights(model)
    model.add_adapter("broken", case.config(num_blocks=3))
    for layer in tuner_layers(model).values():
        layer.diablo_blocks["broken"].data.fill_(float("nan"))
    model.merge_adapter(["default"])
    merged = base_weights(model)
    with pytest.raises(ValueError, match="broken"):
        model.merge_adapter(["broken"], safe_merge=True)
    assert_same_bits(base_weights(model), merged)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)


@every_case
def test_merge_and_unload_gives_a_plain_model_with_the_same_output(case):
    model = case.adapted()
    names = set(case.base().state_dict())
    before = output(model)
    plain = model.merge_and_unload()
    assert type(plain) is type(case.base())
    assert not tuner_layers(plain)
    assert set(plain.state_dict()) == names
    assert_close(output(plain), before, case.tolerance)


@every_case
def test_unload_gives_the_base_model_back(case):
    before = output(case.base())
    weights = base_weights(case.base())
    plain = case.adapted().unload()
    assert not tuner_layers(plain)
    assert_same_bits(base_weights(plain), weights)
    assert torch.equal(output(plain), before)


@every_case
@pytest.mark.parametrize("merged", [False, True])
def test_a_disabled_adapter_gives_the_base_models_output_to_the_bit(case, merged):
    expected = output(case.base())
    model = case.adapted()
    adapted = output(model)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), expected)
    assert_differ(output(model), expected)
    assert_close(output(model), adapted, case.tolerance)


# More than one adapter.


@every_case
def test_two_adapters_are_chosen_by_name_added_up_and_deleted(case):
    base = case.base()
    model = fill(get_peft_model(copy.deepcopy(base), case.config()))
    # Other targets and another number of blocks than the first adapter.
    model.add_adapter("other", case.other_config())
    fill(model, "other", seed=4)
    first = output(model)
    assert_close(first, output(with_dense_delta(base, model, ("default",))), case.tolerance)

    model.set_adapter("other")
    assert all(name.endswith(".diablo_blocks.other") for name in trainable(model))
    second = output(model)
    assert_close(second, output(with_dense_delta(base, model, ("other",))), case.tolerance)
    assert_differ(first, second)

    model.base_model.set_adapter(["default", "other"])
    both = output(model)
    assert_close(both, output(with_dense_delta(base, model, ("default", "other"))), case.tolerance)
    assert_differ(both, first)
    assert_differ(both, second)

    model.set_adapter("default")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not any(".other" in name for name, _ in model.named_parameters())
    assert torch.equal(output(model), first)


def test_a_second_adapter_can_reach_modules_that_the_first_does_not():
    base = mlp().double()
    model = fill(get_peft_model(copy.deepcopy(base), DiabloConfig(num_blocks=4, target_modules=["up"])))
    model.add_adapter("other", DiabloConfig(num_blocks=2, target_modules=["up", "down"], block_pattern={"down": 8}))
    fill(model, "other", seed=4)
    first = output(model)
    assert_close(first, output(with_dense_delta(base, model)), 1e-10)
    assert trainable(model) == {"base_model.model.up.diablo_blocks.default"}
    layers = tuner_layers(model)
    assert layers["up"].diablo_blocks["default"].shape == (4, 4, 6)
    assert layers["up"].diablo_blocks["other"].shape == (2, 8, 12)
    assert layers["down"].diablo_blocks["other"].shape == (8, 3, 1)
    model.set_adapter("other")
    assert_close(output(model), output(with_dense_delta(base, model, ("other",))), 1e-10)
    assert_differ(output(model), first)


@every_dtype
def test_deleting_a_merged_adapter_leaves_the_weights_as_without_it_to_the_bit(dtype):
    case = BY_NAME["ragged"]
    model = case.adapted(dtype)
    before = base_weights(model)
    model.add_adapter("other", case.config(num_blocks=3))
    fill(model, "other", seed=4)
    model.merge_adapter(["other"])
    with_other = base_weights(model)
    model.merge_adapter(["default"])
    model.delete_adapter("default")
    assert_same_bits(base_weights(model), with_other)
    assert all(layer.merged_adapters == ["other"] for layer in tuner_layers(model).values())
    model.delete_adapter("other")
    assert_same_bits(base_weights(model), before)


@every_case
def test_a_deep_copy_is_equal_and_independent(case):
    model = case.adapted()
    before, weights = output(model), base_weights(model)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), before)
    fill(twin, seed=5)
    twin.merge_adapter()
    assert torch.equal(output(model), before)
    # A copy of a merged model has what it needs to undo the merge.
    merged_twin = copy.deepcopy(twin)
    merged_twin.unmerge_adapter()
    assert_same_bits(base_weights(merged_twin), weights)
    assert all(layer.merged for layer in tuner_layers(twin).values())


# Saving and loading.


@every_case
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_loads_with_the_same_output(case, tmp_path, low_cpu_mem_usage):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert_same_output(output(loaded), output(model))
    assert_differ(output(loaded), output(case.base()))
    assert not trainable(loaded)
    assert trainable(PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)) == trainable(model)


@every_case
def test_the_file_holds_the_blocks_alone(case, tmp_path):
    model = case.adapted()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.{name}.diablo_blocks" for name in tuner_layers(model)}
    for name, layer in tuner_layers(model).items():
        assert torch.equal(saved[f"base_model.model.{name}.diablo_blocks"], layer.diablo_blocks["default"])


@every_case
def test_low_cpu_mem_usage_makes_blocks_without_memory(case):
    model = get_peft_model(case.base(), case.config(), low_cpu_mem_usage=True)
    for layer in tuner_layers(model).values():
        assert layer.diablo_blocks["default"].is_meta
        assert not layer.get_base_layer().weight.is_meta
    assert tuner_layers(model)


@pytest.fixture
def saved(tmp_path, request):
    """A base model and an adapter of it, each in its folder, as a user has them: (case, folders, output)."""
    case = BY_NAME[request.param]
    case.base(torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    plain = output(base)
    model = fill(get_peft_model(base, case.config()))
    model.save_pretrained(tmp_path / "adapter")
    expected = output(model)
    assert_differ(expected, plain)
    return case, tmp_path / "base", tmp_path / "adapter", expected


every_saved = pytest.mark.parametrize("saved", ["llama", "gpt2"], indirect=True)


@every_saved
def test_auto_peft_model_finds_the_base_and_loads_the_adapter(saved):
    _, _, adapter, expected = saved
    assert_same_output(output(AutoPeftModelForCausalLM.from_pretrained(adapter)), expected)


@transformers_takes_this_peft
@every_saved
def test_transformers_loads_an_adapters_folder_as_a_model(saved):
    _, _, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(adapter)
    assert any(isinstance(module, DiabloLayer) for module in model.modules())
    assert_same_output(output(model), expected)


@transformers_takes_this_peft
@every_saved
def test_transformers_load_adapter(saved):
    _, base, adapter, expected = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = output(model)
    model.load_adapter(str(adapter))
    assert_same_output(output(model), expected)
    model.disable_adapters()
    assert torch.equal(output(model), plain)
    model.enable_adapters()
    assert_same_output(output(model), expected)


@transformers_takes_this_peft
@every_language_model
def test_transformers_add_adapter(case, tmp_path):
    base = case.base(torch.float32)
    model = copy.deepcopy(base)
    model.add_adapter(case.config(), adapter_name="mine")
    assert torch.equal(output(model), output(base))
    assert len(trainable(model)) == len(tuner_layers(model)) > 0
    fill(model, "mine")
    # float32 against float32: the sum is formed in another order.
    assert_close(output(model), output(with_dense_delta(base, model, ("mine",))), 1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_same_output(output(loaded), output(model))


# Settings.


def test_block_pattern_overrides_num_blocks_by_name_and_by_expression():
    config = DiabloConfig(
        num_blocks=4,
        target_modules=["q_proj", "v_proj"],
        block_pattern={"q_proj": 8, r"layers\.1\.self_attn\.v_proj": 2},
    )
    model = fill(get_peft_model(llama(), config))
    got = {name: layer.diablo_blocks["default"].shape[0] for name, layer in tuner_layers(model).items()}
    assert got == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.0.self_attn.v_proj": 4,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.self_attn.v_proj": 2,
    }


def test_a_block_pattern_is_honoured_after_loading(tmp_path):
    model = fill(
        get_peft_model(mlp(), DiabloConfig(num_blocks=4, target_modules=["up", "down"], block_pattern={"up": 8}))
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path)
    assert tuner_layers(loaded)["up"].diablo_blocks["default"].shape == (8, 2, 3)
    assert_same_output(output(loaded), output(model))


@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform_leaves_the_other_layers_alone(layers):
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj", "up_proj"], layers_to_transform=layers)
    model = get_peft_model(llama(), config)
    assert set(tuner_layers(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}


def test_layers_pattern_names_the_list_of_layers():
    config = DiabloConfig(num_blocks=4, target_modules=["c_attn"], layers_to_transform=[0], layers_pattern="h")
    assert set(tuner_layers(get_peft_model(gpt2(), config))) == {"transformer.h.0.attn.c_attn"}


@pytest.mark.parametrize("exclude", [["v_proj"], r".*\.v_proj"])
def test_exclude_modules(exclude):
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj", "v_proj"], exclude_modules=exclude)
    names = set(tuner_layers(get_peft_model(llama(), config)))
    assert names == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


@saves_biases
@pytest.mark.parametrize(
    ("bias", "expected"),
    [
        ("none", set()),
        ("diablo_only", {"up.base_layer.bias"}),
        ("all", {"up.base_layer.bias", "down.bias", "head.bias"}),
    ],
)
@pytest.mark.parametrize("conv1d", [False, True])
def test_bias(bias, expected, conv1d, tmp_path):
    sizes = (16, 24, 8)
    model = fill(get_peft_model(mlp(sizes, conv1d), DiabloConfig(num_blocks=4, target_modules=["up"], bias=bias)))
    prefix = "base_model.model."
    assert trainable(model) == {prefix + name for name in expected | {"up.diablo_blocks.default"}}
    # Trained biases belong to the adapter: they must come back with it.
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and parameter.requires_grad:
            parameter.data += 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(sizes, conv1d), tmp_path)
    assert_same_output(output(loaded), output(model))


@pytest.mark.skipif(saves_biases.args[0] is False, reason="this PEFT saves biases")
@pytest.mark.parametrize("bias", ["all", "diablo_only"])
def test_biases_that_would_be_lost_on_saving_are_refused(bias):
    config = DiabloConfig(num_blocks=4, target_modules=["up"], bias=bias)
    assert_refused(mlp(), config, ValueError, "bias", "PEFT 0.21")


def test_modules_to_save_are_trained_and_saved_whole(tmp_path):
    config = DiabloConfig(num_blocks=4, target_modules=["up"], modules_to_save=["head"])
    model = fill(get_peft_model(mlp(), config))
    prefix = "base_model.model."
    assert trainable(model) == {
        prefix + "up.diablo_blocks.default",
        prefix + "head.modules_to_save.default.weight",
        prefix + "head.modules_to_save.default.bias",
    }
    before = output(model)
    model.base_model.model.head.modules_to_save["default"].weight.data += 0.5
    assert_differ(output(model), before)
    model.save_pretrained(tmp_path)
    assert_same_output(output(PeftModel.from_pretrained(mlp(), tmp_path)), output(model))


@every_case
def test_dropout_acts_in_training_only(case):
    model = case.adapted(diablo_dropout=0.5)
    without = output(case.adapted())
    assert_same_output(output(model), without)
    model.train()
    torch.manual_seed(0)
    assert_differ(output(model), without)
    # It drops the input of the blocks, not that of the base layer.
    with model.disable_adapter():
        assert torch.equal(output(model), output(case.base()))
    model.eval()
    assert_same_output(output(model), without)


def test_dropout_keeps_the_mean():
    case = BY_NAME["mlp"]
    model = case.adapted(diablo_dropout=0.5)
    layer = tuner_layers(model)["up"]
    x = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = layer(x).detach()
    torch.manual_seed(0)
    layer.train()
    many = layer(x.expand(20_000, 16)).detach()
    # Five standard errors of the mean.
    assert ((many.mean(0) - expected).abs() < 5 * many.std(0) / 20_000**0.5).all()


@pytest.mark.parametrize(
    ("build", "kinds"),
    [(llama, {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}), (gpt2, {"c_attn"})],
)
def test_default_targets(build, kinds):
    model = get_peft_model(build(), DiabloConfig(num_blocks=4))
    names = list(tuner_layers(model))
    assert {name.rpartition(".")[2] for name in names} == kinds
    # In each of the two layers.
    assert len(names) == 2 * len(kinds)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_all_linear_takes_every_linear_layer_but_the_head(build):
    expected = {
        name
        for name, module in build().named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != "lm_head"
    }
    model = get_peft_model(build(), DiabloConfig(num_blocks=4, target_modules="all-linear"))
    assert set(tuner_layers(model)) == expected


def test_an_expression_chooses_targets():
    model = get_peft_model(llama(), DiabloConfig(num_blocks=4, target_modules=r".*\.0\.mlp\.(up|down)_proj"))
    assert set(tuner_layers(model)) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}


def test_init_weights_false_draws_blocks():
    model = get_peft_model(mlp(), DiabloConfig(num_blocks=4, target_modules=["up"], init_weights=False))
    blocks = tuner_layers(model)["up"].diablo_blocks["default"]
    assert (blocks != 0).all()


# Errors.


def assert_refused(model: nn.Module, config: DiabloConfig, error: type[Exception], *words: str) -> None:
    """The message has the words, and the model is what it was: PEFT injects layer by layer and does not undo it."""
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error) as caught:
        get_peft_model(model, config)
    for word in words:
        assert word in str(caught.value)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_targets_that_match_nothing():
    config = DiabloConfig(num_blocks=4, target_modules=["q_prj"])
    assert_refused(llama(), config, ValueError, "q_prj", "LlamaForCausalLM", "q_proj", "down_proj")


def test_filters_that_leave_nothing_are_named():
    config = DiabloConfig(num_blocks=4, target_modules=["q_proj"], layers_to_transform=[7])
    assert_refused(llama(), config, ValueError, "q_proj", "layers_to_transform=[7]")


def test_a_target_of_a_kind_that_is_not_supported():
    # q_proj comes before the norm, and fits: it must not be adapted either.
    config = DiabloConfig(num_blocks=4, target_modules=["input_layernorm", "q_proj"])
    assert_refused(llama(), config, TypeError, "model.layers.0.input_layernorm", "LlamaRMSNorm")


def test_too_many_blocks():
    # up is 16 -> 24 and fits; down is 24 -> 8 and comes second.
    config = DiabloConfig(num_blocks=16, target_modules=["up", "down"])
    assert_refused(mlp(), config, ValueError, "down", "in_features=24", "out_features=8", "at most 8 blocks", "not 16")


def test_the_largest_number_of_blocks_that_the_message_names_fits():
    config = DiabloConfig(num_blocks=16, target_modules=["up", "down"], block_pattern={"down": 8})
    assert set(tuner_layers(get_peft_model(mlp(), config))) == {"up", "down"}


def test_a_block_pattern_that_matches_nothing():
    config = DiabloConfig(num_blocks=4, target_modules=["up"], block_pattern={"v_prj": 2})
    assert_refused(mlp(), config, ValueError, "v_prj", "up")


def test_no_targets_for_an_unknown_kind_of_model():
    assert_refused(mlp(), DiabloConfig(num_blocks=4), ValueError, "target_modules", "up, down, head", "all-linear")


def test_a_refused_second_adapter_leaves_the_first_working():
    model = BY_NAME["mlp"].adapted()
    before = output(model)
    with pytest.raises(ValueError, match="at most 8 blocks"):
        model.add_adapter("other", DiabloConfig(num_blocks=16, target_modules=["up", "down"]))
    assert not any("other" in layer.diablo_blocks for layer in tuner_layers(model).values())
    assert torch.equal(output(model), before)


# Precision and memory.


@every_case
def test_blocks_are_float32_on_a_bfloat16_base_unless_peft_is_told_otherwise(case):
    model = case.adapted(torch.bfloat16)
    assert {layer.diablo_blocks["default"].dtype for layer in tuner_layers(model).values()} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    backward(model)
    for layer in tuner_layers(model).values():
        assert layer.diablo_blocks["default"].grad.dtype == torch.float32
    kept = get_peft_model(case.base(torch.bfloat16), case.config(), autocast_adapter_dtype=False)
    assert {layer.diablo_blocks["default"].dtype for layer in tuner_layers(kept).values()} == {torch.bfloat16}


@every_case
def test_a_training_step_under_autocast(case):
    model = case.adapted(torch.float32)
    before = base_weights(model)
    reference = copy.deepcopy(model)
    backward(reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # BART adds a bias to its logits, in the dtype of the weights.
        assert output(model).dtype == (torch.float32 if case.name == "bart" else torch.bfloat16)
        backward(model)
    for (name, layer), exact in zip(tuner_layers(model).items(), tuner_layers(reference).values(), strict=True):
        blocks, expected = layer.diablo_blocks["default"], exact.diablo_blocks["default"].grad
        assert blocks.grad.dtype == torch.float32
        # bfloat16 has 8 bits: over a few layers the gradient points the same way, and no more can be said.
        assert torch.cosine_similarity(blocks.grad.flatten(), expected.flatten(), dim=0) > 0.98, name
        assert not torch.equal(blocks.grad, expected), "autocast had no effect"
    old = {name: layer.diablo_blocks["default"].detach().clone() for name, layer in tuner_layers(model).items()}
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    for name, layer in tuner_layers(model).items():
        assert not torch.equal(layer.diablo_blocks["default"], old[name])
    assert_same_bits(base_weights(model), before)


@every_language_model
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_equal_gradients(case, use_reentrant):
    model = case.adapted(diablo_dropout=0.5)
    model.train()
    layer = next(iter(tuner_layers(model).values()))
    forwards = []
    layer.register_forward_hook(lambda *_: forwards.append(1))

    def gradients():
        model.zero_grad()
        forwards.clear()
        torch.manual_seed(0)
        backward(model)
        return [layer.diablo_blocks["default"].grad.clone() for layer in tuner_layers(model).values()]

    expected = gradients()
    assert len(forwards) == 1
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    got = gradients()
    assert len(forwards) == 2, "nothing was recomputed"
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
