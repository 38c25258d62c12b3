"""Rows of one batch with different adapters, weighted sums, switching, and what loading refuses."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import (
    CASES,
    LINEAR_CASES,
    LargestAllocation,
    assert_close,
    assert_same_bits,
    assert_same_output,
    base_weights,
    fill,
    llama,
    mlp,
    output,
    tuner_layers,
    with_dense_delta,
)
from torch._dynamo.testing import CompileCounterWithBackend

from diablo import DiabloConfig

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_case_of_linear_layers = pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
every_language_model = pytest.mark.parametrize("case", [BY_NAME["llama"], BY_NAME["gpt2"]], ids=lambda case: case.name)


def two_adapters(case, dtype=torch.float64):
    """An adapted model with a second adapter of other blocks on fewer modules."""
    model = case.adapted(dtype)
    model.add_adapter("other", case.other_config())
    return fill(model, "other", seed=4).eval()


# Rows of one batch.


def tokens(rows=5, length=6):
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(7))


NAMES = ["other", "default", "__base__", "default", "other"]


def one_by_one(model, call, inputs):
    """What each row gives alone, with its adapter active, or with none."""
    rows = []
    for name, row in zip(NAMES, inputs, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(row[None]))
        else:
            model.set_adapter(name)
            rows.append(call(row[None]))
    model.set_adapter("default")
    return torch.cat(rows)


@every_language_model
def test_rows_with_different_adapters_equal_each_row_alone(case):
    model = two_adapters(case)
    inputs = tokens()
    with torch.no_grad():
        expected = one_by_one(model, lambda ids: model(input_ids=ids).logits, inputs)
        mixed = model(input_ids=inputs, adapter_names=NAMES).logits
        plain = model(input_ids=inputs).logits
    assert_close(mixed, expected, case.tolerance)
    assert (mixed - plain).abs().max() > 1e-2
    # The next call is not affected.
    with torch.no_grad():
        assert torch.equal(model(input_ids=inputs).logits, plain)


@pytest.mark.parametrize("name", ["mlp", "ragged", "overhang", "conv1d"])
def test_rows_of_a_plain_module_with_different_adapters(name):
    model = two_adapters(BY_NAME[name])
    up = tuner_layers(model)["up"]
    inputs = torch.randn(5, 3, up.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = one_by_one(model, model, inputs)
        assert_close(model(inputs, adapter_names=NAMES), expected, 1e-10)
        assert (expected - model(inputs)).abs().max() > 1e-2


@every_language_model
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_different_adapters_equals_each_row_alone(case, num_beams):
    model = two_adapters(case)
    inputs = tokens()

    def generate(ids, **settings):
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            num_beams=num_beams,
            pad_token_id=0,
            **settings,
        )

    expected = one_by_one(model, generate, inputs)
    mixed = generate(inputs, adapter_names=NAMES)
    assert torch.equal(mixed, expected)
    assert not torch.equal(mixed, generate(inputs))


def test_rows_choose_among_saved_modules_too():
    model = fill(get_peft_model(mlp().double(), DiabloConfig(num_blocks=4, target_modules=["up"]))).eval()
    config = DiabloConfig(num_blocks=4, target_modules=["up"], modules_to_save=["head"])
    model.add_adapter("other", config)
    fill(model, "other", seed=4)
    model.base_model.model.head.modules_to_save["other"].weight.data += 0.5
    inputs = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = one_by_one(model, model, inputs)
        assert_close(model(inputs, adapter_names=NAMES), expected, 1e-10)


def test_gradients_reach_each_rows_adapter():
    model = two_adapters(BY_NAME["mlp"])
    for layer in tuner_layers(model).values():
        layer.diablo_blocks.requires_grad_(True)
    inputs = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(inputs, adapter_names=NAMES).sum().backward()
    up = tuner_layers(model)["up"]
    got = {name: up.diablo_blocks[name].grad.clone() for name in ("default", "other")}
    for name, gradient in got.items():
        model.zero_grad()
        model.set_adapter(name)
        model(inputs[[row for row, given in enumerate(NAMES) if given == name]]).sum().backward()
        assert_close(gradient, up.diablo_blocks[name].grad, 1e-10)


def test_adapter_names_that_cannot_be_honoured_are_refused():
    model = two_adapters(BY_NAME["mlp"])
    inputs = torch.zeros(2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="othr; the model has default, other"):
        model(inputs, adapter_names=["othr", "default"])
    with pytest.raises(ValueError, match="3 names and the layer's input 2 rows"):
        model(inputs, adapter_names=["default"] * 3)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"default is merged; call unmerge_adapter\(\)"):
        model(inputs, adapter_names=["default", "other"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model(inputs, adapter_names=["default", "other"])


# Weighted sums.


@every_case
def test_a_weighted_adapter_is_the_weighted_sum_of_the_dense_updates(case):
    base = case.base()
    model = fill(get_peft_model(copy.deepcopy(base), case.config())).eval()
    # The same blocks on fewer modules: where it has none it counts as zero.
    model.add_adapter("other", case.config(target_modules=[case.targets[0]]))
    fill(model, "other", seed=4)
    before = output(model)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "sum")
    assert torch.equal(output(model), before)
    model.set_adapter("sum")
    dense = copy.deepcopy(base)
    for weight, name in ((0.7, "default"), (-1.5, "other")):
        scaled = with_dense_delta(base, model, (name,))
        for (_, total), (_, plain), (_, part) in zip(
            dense.named_parameters(), base.named_parameters(), scaled.named_parameters(), strict=True
        ):
            total.data += weight * (part.data - plain.data)
    assert_close(output(model), output(dense), case.tolerance)
    assert (output(model) - before).abs().max() > 1e-2


@pytest.mark.skipif(
    Version(peft.__version__) < Version("0.20"), reason="this PEFT writes all adapters of a model into one file"
)
def test_a_weighted_adapter_is_saved_and_loaded(tmp_path):
    case = BY_NAME["llama"]
    settings = {"block_pattern": {"v_proj": 2}}
    model = case.adapted(torch.float32, **settings)
    model.add_adapter("other", case.config(**settings))
    fill(model, "other", seed=4)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    model.set_adapter("mean")
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    loaded = PeftModel.from_pretrained(case.base(torch.float32), tmp_path / "mean")
    assert_same_output(output(loaded), output(model))


def test_what_cannot_be_summed_is_refused_and_nothing_is_added():
    case = BY_NAME["mlp"]
    model = two_adapters(case)
    add = model.add_weighted_adapter
    with pytest.raises(ValueError, match=r"cut up into different blocks .default: 4, other: 3."):
        add(["default", "other"], [1, 1], "sum")
    with pytest.raises(ValueError, match=r"combination_type='blocks' does not exist.*'linear'"):
        add(["default"], [1], "sum", combination_type="blocks")
    with pytest.raises(ValueError, match="no adapters third; it has default, other"):
        add(["default", "third"], [1, 1], "sum")
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        add(["default", "other"], [1], "sum")
    with pytest.raises(ValueError, match="already has an adapter 'other'"):
        add(["default"], [1], "other")
    assert list(model.peft_config) == ["default", "other"]
    assert not any("sum" in layer.diablo_blocks for layer in tuner_layers(model).values())
    saving = get_peft_model(mlp(), case.config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        saving.add_weighted_adapter(["default"], [1.0], "sum")


# Switching under compile.


def test_switching_back_and_forth_under_compile_compiles_each_adapter_once():
    torch._dynamo.reset()
    model = two_adapters(BY_NAME["mlp"], torch.float32)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    inputs = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))

    def both():
        for name in ("default", "other"):
            model.set_adapter(name)
            # Eager and compiled forwards take turns in one model.
            assert_close(compiled(inputs), model(inputs), 1e-5)

    both()
    frames = counter.frame_count
    both()
    both()
    assert counter.frame_count == frames


@pytest.mark.parametrize("name", ["ragged", "llama"])
def test_forward_and_backward_compile_without_a_graph_break(name):
    torch._dynamo.reset()
    model = BY_NAME[name].adapted(torch.float32)
    layer = next(iter(tuner_layers(model).values()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, layer.in_features, requires_grad=True, generator=torch.Generator().manual_seed(1))
    blocks = layer.diablo_blocks["default"]
    got = torch.autograd.grad(compiled(x).square().sum(), [x, blocks])
    expected = torch.autograd.grad(layer(x).square().sum(), [x, blocks])
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-4)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "beside"])
@pytest.mark.parametrize("name", ["ragged", "llama"])
def test_a_compiled_layer_takes_any_number_of_tokens_without_compiling_again(name, in_place):
    torch._dynamo.reset()
    model = BY_NAME[name].adapted(torch.float32, in_place=in_place).train()
    layer = next(iter(tuner_layers(model).values()))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    blocks = layer.diablo_blocks["default"]
    # Fewer tokens than a product is worth starting otherwise for, and more of them.
    for rows, length in ((3, 5), (2, 9), (4, 50)):
        x = torch.randn(rows, length, layer.in_features, generator=torch.Generator().manual_seed(rows))
        got = torch.autograd.grad(compiled(x.requires_grad_()).square().sum(), [x, blocks])
        expected = torch.autograd.grad(layer(x).square().sum(), [x, blocks])
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, 1e-4)
        assert counter.frame_count == 1


# Loading.


def break_file(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@every_case
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_missing_tensor_is_an_error_that_names_it(case, low_cpu_mem_usage, second):
    folder, _ = second(case)
    name = sorted(load_file(folder / "adapter_model.safetensors"))[0]
    break_file(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        PeftModel.from_pretrained(case.base(torch.float32), folder, low_cpu_mem_usage=low_cpu_mem_usage)


def test_a_tensor_too_many_is_an_error_that_names_it(second):
    case = BY_NAME["mlp"]
    folder, _ = second(case)
    break_file(folder, lambda tensors: tensors.update({"base_model.model.head.diablo_blocks": torch.zeros(2, 4, 3)}))
    with pytest.raises(RuntimeError, match=r"more tensors than the model takes: base_model.model.head.diablo_blocks"):
        PeftModel.from_pretrained(case.base(torch.float32), folder)


def test_a_file_with_none_of_the_tensors_is_an_error(second):
    case = BY_NAME["mlp"]
    folder, _ = second(case)
    break_file(folder, lambda tensors: (tensors.clear(), tensors.update({"something.else": torch.zeros(1)})))
    with pytest.raises(RuntimeError, match=r"lacks base_model.model.down.diablo_blocks"):
        PeftModel.from_pretrained(case.base(torch.float32), folder)


def test_a_state_dict_of_the_whole_model_loads_strictly():
    case = BY_NAME["mlp"]
    model, twin = two_adapters(case), two_adapters(case)
    fill(twin, seed=9)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(twin), output(model))


def test_an_adapter_of_another_num_blocks_is_an_error_that_names_tensors(second):
    case = BY_NAME["mlp"]
    folder, _ = second(case)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "num_blocks": 8}))
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model.model.up.diablo_blocks.default"):
        PeftModel.from_pretrained(case.base(torch.float32), folder)


# A shared weight.


def test_merging_into_a_shared_weight_is_refused():
    config = llama().config
    config.tie_word_embeddings = True
    model = type(llama())(config)
    model = fill(get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=["lm_head", "q_proj"]))).eval()
    before = base_weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
            merge()
    assert_same_bits(base_weights(model), before)


# What a layer hands on.


@every_case_of_linear_layers
def test_the_gradient_of_a_linear_layers_input_is_that_of_the_dense_weights(case):
    base = case.base()
    model = fill(get_peft_model(copy.deepcopy(base), case.config()))
    dense = with_dense_delta(base, model)
    for name, layer in tuner_layers(model).items():
        x = torch.randn(4, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_(True)
        (got,) = torch.autograd.grad(layer(x).square().sum(), x)
        (expected,) = torch.autograd.grad(dense.get_submodule(name)(x).square().sum(), x)
        assert_close(got, expected, 1e-10)


def test_one_adapters_dropout_does_not_reach_the_next_adapters_input():
    case = BY_NAME["mlp"]
    model = get_peft_model(case.base(), case.config(diablo_dropout=0.9))
    model.add_adapter("other", case.config())
    # The first adapter's blocks are zero: whatever it drops must not show.
    fill(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    expected = output(model.eval())
    assert torch.equal(output(model.train()), expected)


def test_the_product_is_added_into_the_base_layers_output():
    layer = tuner_layers(BY_NAME["mlp"].adapted())["up"]
    outputs = []
    layer.get_base_layer().register_forward_hook(lambda module, args, result: outputs.append(result))
    with torch.no_grad():
        y = layer(torch.ones(2, 16, dtype=torch.float64))
    assert y.data_ptr() == outputs[0].data_ptr()


@every_case
def test_a_merged_model_that_is_not_trained_stays_merged_when_its_adapter_is_switched(case):
    model = two_adapters(case, torch.float32)
    before = base_weights(model)
    expected = {}
    for names in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(names)
        model.merge_adapter()
        expected[str(names)] = base_weights(model)
        model.unmerge_adapter()
    model.base_model.set_adapter("default")
    model.merge_adapter()
    for names in ("other", "default", ["default", "other"], "default", "other"):
        with LargestAllocation() as allocations:
            model.base_model.set_adapter(names)
        assert_same_bits(base_weights(model), expected[str(names)])
        largest = max(
            layer.diablo_blocks[name].numel() for layer in tuner_layers(model).values() for name in layer.diablo_blocks
        )
        assert allocations.largest <= largest
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
    assert not any(layer.merged for layer in tuner_layers(model).values())


def test_switching_a_merged_model_to_an_adapter_that_it_has_not_changes_nothing():
    model = two_adapters(BY_NAME["mlp"], torch.float32)
    model.merge_adapter()
    before = base_weights(model)
    with pytest.raises(ValueError, match="nothing"):
        model.set_adapter("nothing")
    assert_same_bits(base_weights(model), before)
    assert all(layer.merged for layer in tuner_layers(model).values())


def test_a_merged_model_in_training_mode_is_unmerged_as_by_peft_when_its_adapter_is_switched():
    model = two_adapters(BY_NAME["mlp"], torch.float32)
    before = base_weights(model)
    model.merge_adapter()
    model.train()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert_same_bits(base_weights(model), before)


def test_switching_a_merged_model_to_an_adapter_on_a_shared_weight_is_refused():
    model = BY_NAME["llama"].adapted(torch.float32)
    model.add_adapter("other", DiabloConfig(num_blocks=4, target_modules=["lm_head"]))
    inner = model.get_base_model()
    model.merge_adapter(["default"])
    inner.lm_head.base_layer.weight = inner.model.embed_tokens.weight
    before = base_weights(model)
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        model.base_model.set_adapter("other")
    assert_same_bits(base_weights(model), before)
    assert model.base_model.active_adapters == ["default"]
