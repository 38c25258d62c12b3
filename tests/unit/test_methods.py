"""The methods of a recipe: their sizes at equal parameters, their scales, and what PiSSA leaves on disk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, MissConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo import BlockLayout, DiabloConfig
from diablo.models.adapters import load_adapter
from diablo.models.saving import save_adapter, save_start
from diablo.recipes.applying import apply_method, closest_size, nearest_size
from diablo.recipes.methods import LoraMethod

# What a layer trains at a size, by the methods' papers, to hold against what is counted.
FORMULAS = {
    "lora": (lambda size: LoraConfig(r=size), lambda i, o, r: r * (i + o)),
    "dora": (lambda size: LoraConfig(r=size, use_dora=True), lambda i, o, r: r * (i + o) + o),
    "miss": (lambda size: MissConfig(r=size), lambda i, o, r: r * o),
    # The only one that trains less the larger its size is.
    "diablo": (lambda size: DiabloConfig(num_blocks=size), lambda i, o, n: BlockLayout(i, o, n).num_parameters),
}

shapes = st.dictionaries(st.tuples(st.integers(2, 24), st.integers(2, 24)), st.integers(1, 5), min_size=1, max_size=3)


@pytest.mark.parametrize("method", FORMULAS)
@given(shapes=shapes, wanted=st.integers(1, 5000))
@settings(max_examples=15, deadline=None)
def test_no_size_comes_closer_than_the_one_that_is_chosen(method, shapes, wanted):
    config, formula = FORMULAS[method]
    chosen = nearest_size(config, shapes, wanted)

    def distance(size: int) -> int:
        return abs(sum(count * formula(*shape, size) for shape, count in shapes.items()) - wanted)

    assert distance(chosen) == min(distance(size) for size in range(1, min(map(min, shapes)) + 1))


def test_only_the_sizes_that_are_given_are_chosen():
    lora = FORMULAS["lora"][0]
    assert nearest_size(lora, {(16, 16): 1}, 7 * 32) == 7
    assert nearest_size(lora, {(16, 16): 1}, 7 * 32, [2, 4, 8, 16]) == 8


def test_the_targets_of_the_config_play_no_part():
    def config(rank: int) -> LoraConfig:
        return LoraConfig(
            r=rank, target_modules=["q_proj"], exclude_modules=["layer"], layers_to_transform=[1], task_type="CAUSAL_LM"
        )

    assert nearest_size(config, {(16, 16): 2}, 2 * 3 * 32) == 3


@given(
    steps=st.lists(st.tuples(st.floats(1, 2), st.integers(0, 9)), max_size=30),
    wanted=st.integers(1, 150),
    falls=st.booleans(),
    last=st.integers(60, 2000),
)
def test_sizes_that_a_method_does_not_take_are_passed_over(steps, wanted, falls, last):
    size, count, counts = 3, 5, {3: 5}
    for factor, more in steps:
        size, count = max(size + 1, int(factor * size)), count + more
        counts[size] = count
    if falls:
        counts = dict(zip(counts, reversed(counts.values()), strict=True))
    chosen = closest_size(counts.get, wanted, range(1, last))
    best = min(abs(each - wanted) for size, each in counts.items() if size < last)
    # A number that stands still for long is taken not to change any more.
    if all(more for _, more in steps):
        assert abs(counts[chosen] - wanted) == best


def test_no_size_is_chosen_where_none_is_taken():
    assert closest_size(lambda size: None, 100, range(1, 1000)) is None


def test_few_sizes_are_counted_of_many():
    asked = []

    def parameters(size: int) -> int:
        asked.append(size)
        return 3 * size

    assert closest_size(parameters, 3_000_001, range(1, 10**7)) == 1_000_000
    assert len(asked) < 50


@pytest.mark.parametrize(("name", "scale"), [("lora", 2.0), ("dora", 2.0), ("pissa", 1.0), ("rslora", 16 / 8**0.5)])
def test_without_an_alpha_each_method_has_its_usual_scale(tiny_model, name, scale):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = apply_method(model, LoraMethod(name=name, r=8))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(scale)
    assert LoraMethod(name=name, r=8, lora_alpha=5).alpha == 5


def test_pissa_starts_at_the_base_model_and_is_saved_as_lora_on_its_weights(tiny_model, tmp_path):
    ids = torch.arange(3, 33).unsqueeze(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    weight = base.model.layers[0].self_attn.q_proj.weight.clone()
    plain = base(ids).logits
    adapted = apply_method(base, LoraMethod(name="pissa", r=4)).eval()
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert not torch.equal(layer.base_layer.weight, weight)
    torch.testing.assert_close(adapted(ids).logits, plain, rtol=1e-4, atol=1e-5)

    start = save_start(adapted, tmp_path / "start")
    assert start is not None
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    trained = adapted(ids).logits
    assert (trained - plain).abs().max() > 1e-2
    save_adapter(adapted, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "adapter", start=start)
    # The model itself is left as it was.
    assert [adapted.active_adapter, *adapted.peft_config] == ["default", "default"]
    assert torch.equal(adapted(ids).logits, trained)

    loaded, _ = load_adapter(tmp_path / "adapter")
    assert isinstance(loaded, PeftModel)
    assert loaded.active_peft_config.r == 8
    assert torch.equal(loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, weight)
    torch.testing.assert_close(loaded(ids).logits, trained, rtol=1e-4, atol=1e-5)
    assert "written as LoRA of 8" in (tmp_path / "adapter" / "README.md").read_text()
    with loaded.disable_adapter():
        assert torch.equal(loaded(ids).logits, plain)


def test_other_methods_have_no_start_to_save(tiny_model, tmp_path):
    adapted = apply_method(AutoModelForCausalLM.from_pretrained(tiny_model), LoraMethod(name="lora", r=4))
    assert save_start(adapted, tmp_path / "start") is None
    assert not (tmp_path / "start").exists()
