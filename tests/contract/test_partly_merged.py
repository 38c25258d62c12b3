"""Several active adapters of which some are merged: what is not stands beside the merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    CASES,
    assert_close,
    assert_same_bits,
    backward,
    base_weights,
    fill,
    output,
    tuner_layers,
    with_dense_delta,
)

from diablo import DiabloConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    # Of layers without the adapter that was merged.
    pytest.mark.filterwarnings("ignore:Already unmerged"),
]
BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# "other" is on the first kind of module alone.
either_one = pytest.mark.parametrize("merged", ["default", "other"])


def both_active(case, dtype=torch.float64, **settings):
    model = case.adapted(dtype, **settings)
    model.add_adapter("other", case.other_config())
    fill(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


def gradients(model, adapter_name):
    model.zero_grad()
    backward(model)
    return {name: layer.diablo_blocks[adapter_name].grad.clone() for name, layer in tuner_layers(model).items()}


@every_case
@either_one
def test_merging_one_of_two_active_adapters_changes_no_output(case, merged):
    base = case.base()
    model = both_active(case)
    before = base_weights(model)
    expected = output(with_dense_delta(base, model, ("default", "other")))
    model.merge_adapter([merged])
    assert_close(output(model), expected, case.tolerance)
    layers = [layer for layer in tuner_layers(model).values() if merged in layer.diablo_blocks]
    assert layers
    assert all(layer.merged_adapters == [merged] for layer in layers)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
    assert_close(output(model), expected, case.tolerance)


@every_case
def test_what_is_merged_and_what_is_active_follow_every_verb(case):
    base = case.base()
    model = both_active(case)
    before = base_weights(model)
    model.merge_adapter(["default"])
    with model.disable_adapter():
        assert torch.equal(output(model), output(base))
    # To be switched off, it was unmerged.
    both = output(with_dense_delta(base, model, ("default", "other")))
    assert_close(output(model), both, case.tolerance)
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    assert_close(output(model), both, case.tolerance)
    model.set_adapter("other")
    assert_close(output(model), output(with_dense_delta(base, model, ("other",))), case.tolerance)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)


@every_case
def test_an_adapter_is_trained_beside_a_merged_one_as_beside_one_that_is_not(case):
    model = case.adapted()
    model.add_adapter("other", case.config(num_blocks=case.other_num_blocks))
    fill(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    model.train()
    before = base_weights(model)
    expected = gradients(model, "other")
    model.merge_adapter(["default"])
    weights = base_weights(model)
    got = gradients(model, "other")
    for name, gradient in expected.items():
        assert_close(got[name], gradient, case.tolerance * 10)
    assert all(layer.diablo_blocks["default"].grad is None for layer in tuner_layers(model).values())
    assert_same_bits(base_weights(model), weights)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)


def test_a_layer_without_the_merged_adapter_keeps_its_blocks_in_the_weight():
    model = BY_NAME["mlp"].adapted(torch.float32)
    model.add_adapter("other", DiabloConfig(num_blocks=4, target_modules=["down"]))
    fill(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["other"])
    held = {}
    for name, layer in tuner_layers(model).items():
        layer.register_forward_hook(
            lambda layer, *_, name=name: held.update({name: layer.number in layer.passes.written.held})
        )
    output(model)
    assert held == {"up": True, "down": False}


@pytest.mark.parametrize("name", ["ragged", "ragged_beside", "llama", "conv1d", "conv_2d", "embedding"])
def test_under_compile_what_is_not_merged_is_added_too(name):
    torch._dynamo.reset()
    model = both_active(BY_NAME[name], torch.float32)
    expected = output(model)
    model.compile(backend="aot_eager")
    for merged in (["default"], ["other"]):
        # A graph of what is merged now, and not of what was before.
        model.merge_adapter(merged)
        assert_close(output(model), expected, 1e-4)
        model.unmerge_adapter()
        assert_close(output(model), expected, 1e-4)


def test_generation_is_that_of_both_adapters():
    model = both_active(BY_NAME["llama"])
    ids = torch.tensor([[1, 5, 9, 4]])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    model.merge_adapter(["default"])
    only = copy.deepcopy(model)
    only.base_model.set_adapter("default")
    assert torch.equal(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), expected)
    assert not torch.equal(only.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings), expected)


def test_rows_of_different_adapters_stay_an_error_while_one_is_merged():
    model = both_active(BY_NAME["mlp"], torch.float32)
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"other is merged; call unmerge_adapter\(\)"):
        model(torch.zeros(2, 16), adapter_names=["default", "other"])


def test_in_place_true_is_an_error_where_a_merged_adapter_rules_it_out():
    model = both_active(BY_NAME["mlp"], torch.float32, in_place=True)
    model.merge_adapter(["other"])
    with pytest.raises(RuntimeError, match=r"in_place=True has become impossible .* other is merged"):
        output(model)
    model.merge_adapter(["default"])
    output(model)


@pytest.mark.parametrize("name", ["mlp", "ragged_beside"])
def test_unmerging_between_a_forward_and_its_backward_is_an_error(name):
    model = both_active(BY_NAME[name], torch.float32).train()
    model.merge_adapter(["default"])
    loss = model(torch.randn(2, tuner_layers(model)["up"].in_features)).sum()
    model.unmerge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
