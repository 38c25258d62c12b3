"""What `diablo plan` says is what training then takes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from peft import ShiraConfig, get_peft_model
from references import SavedBytes, allocations
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from diablo import DiabloConfig, suggested_learning_rate
from diablo.errors import UserError
from diablo.models.checkpointing import checkpointing_options
from diablo.models.loading import load_config
from diablo.models.stored_weights import StoredWeights
from diablo.planning import rates
from diablo.planning.kept import kept_for_backward
from diablo.planning.sizes import plan_sizes, sizes_of
from diablo.recipes.methods import LoraMethod, PeftMethod


def test_parameters_and_activations_are_those_of_the_real_model(tiny_model):
    sizes = plan_sizes(str(tiny_model), num_blocks=4, batch_size=3, length=40, dtype=torch.float32)
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), DiabloConfig(num_blocks=4)).train()
    trained, total = real.get_nb_trainable_parameters()
    assert sizes.trained == trained
    assert sizes.total == total
    estimate = sizes.memory[0]
    ids = torch.zeros(3, 40, dtype=torch.long)
    with SavedBytes(real) as kept:
        real(input_ids=ids, labels=ids, use_cache=False)
    assert estimate.activations == pytest.approx(kept.total, rel=0.05)
    assert estimate.weights == 4 * (total - trained)
    # In fp32 the blocks, and the diagonals as they were.
    assert estimate.adapter == 8 * trained
    assert (estimate.gradients, estimate.optimizer) == (4 * trained, 8 * trained)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Wide enough that products are worth keeping, and deep enough that what one layer needs is a part of the whole."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_activations_under_gradient_checkpointing_are_what_the_allocator_gives_out(llama, checkpointing):
    estimate = plan_sizes(str(llama), batch_size=2, length=128, dtype=torch.float32, checkpointing=checkpointing)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), DiabloConfig(num_blocks=64)).train()
    model.enable_input_require_grads()
    if checkpointing != "none":
        model.gradient_checkpointing_enable(checkpointing_options(checkpointing))
    ids = torch.zeros(2, 128, dtype=torch.long)

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    # The gradients of the blocks, which are counted by themselves, are there from now on.
    forward().backward()
    kept, most = allocations(forward, lambda loss: loss.backward())
    # Gradients of activations and buffers of kernels come on top.
    assert 0.97 * kept < estimate.memory[0].activations < most < 1.25 * estimate.memory[0].activations


def test_the_methods_are_compared_at_equal_parameters(tiny_model):
    diablo, lora, full = plan_sizes(str(tiny_model), num_blocks=4, batch_size=2, length=64).memory
    assert lora.trained == pytest.approx(diablo.trained, rel=0.1)
    assert full.trained > 5 * diablo.trained
    assert diablo.activations < lora.activations
    assert diablo.total < lora.total < full.total


def test_a_method_that_starts_from_the_values_of_weights_has_parameters_and_no_estimate_of_memory(tiny_model):
    sizes = sizes_of(
        load_config(str(tiny_model)),
        PeftMethod.model_validate({"name": "peft", "type": "SHIRA", "r": 4, "target_modules": ["q_proj"]}),
        batch_size=2,
        length=8,
        dtype=torch.float32,
        files_of=str(tiny_model),
    )
    config = ShiraConfig(r=4, target_modules=["q_proj"])
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    assert (sizes.trained, sizes.total) == real.get_nb_trainable_parameters()
    assert [each.method for each in sizes.memory] == ["full fine-tuning"]
    assert sizes.learning_rate is None


@pytest.mark.parametrize("budget", [0.2, 0.05, 0.03])
def test_a_budget_is_kept_and_used(tiny_model, budget):
    sizes = plan_sizes(str(tiny_model), budget=budget, length=8)
    share = sizes.trained / sizes.total
    assert share <= budget
    if sizes.num_blocks > 1:
        assert plan_sizes(str(tiny_model), num_blocks=sizes.num_blocks - 1, length=8).trained / sizes.total > budget


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"budget": 1e-6}, "the smallest share of this model"),
        ({"budget": 1.5}, "--budget: found 150"),
        ({"budget": 0.1, "num_blocks": 4}, "give one of the two"),
        ({"num_blocks": 4096}, "takes at most 32 blocks, not 4096"),
        ({"target_modules": ["nothing"]}, "nothing match"),
        ({"checkpointing": "some"}, "--gradient-checkpointing: found 'some'; allowed: none, selective, full"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model, settings, match):
    with pytest.raises(UserError, match=match):
        plan_sizes(str(tiny_model), length=8, **settings)


@pytest.mark.parametrize("num_blocks", [4, 16])
def test_the_learning_rate_is_that_of_the_loaded_model(tiny_model, num_blocks):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    expected = suggested_learning_rate(get_peft_model(model, DiabloConfig(num_blocks=num_blocks)))
    assert plan_sizes(str(tiny_model), num_blocks=num_blocks, length=8).learning_rate == expected


def test_of_a_large_model_some_of_the_weights_tell_the_learning_rate(tiny_model, monkeypatch):
    every = plan_sizes(str(tiny_model), num_blocks=4, length=8).learning_rate
    monkeypatch.setattr(rates, "MOST_BYTES", 20_000)
    read = []
    whole = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", lambda self, names: read.extend(names) or whole(self, names))
    assert plan_sizes(str(tiny_model), num_blocks=4, length=8).learning_rate == pytest.approx(every, rel=0.3)
    assert 0 < len(read) < 10


def test_where_no_weights_are_at_hand_no_learning_rate_is_told(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert plan_sizes(str(tmp_path), num_blocks=4, length=8).learning_rate is None


@pytest.mark.parametrize(("quantization", "bytes_each"), [(None, 4), ("int8", 1), ("nf4", 0.5 + 4 / 64)])
def test_quantized_weights_are_those_of_the_linear_layers_but_the_head(tiny_model, quantization, bytes_each):
    config = load_config(str(tiny_model))
    options = {"batch_size": 1, "length": 8, "dtype": torch.float32, "quantization": quantization}
    weights = sizes_of(config, LoraMethod(name="lora", r=2), **options).memory[0].weights
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    linear = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n)
    others = sum(parameter.numel() for parameter in model.parameters()) - linear
    assert weights == 4 * others + linear * bytes_each


def test_what_is_counted_is_let_go_of():
    # A graph that keeps its own outputs through Python objects is a cycle that no collector sees: a gigabyte a call.
    model, outputs = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid()), []

    def forward() -> torch.Tensor:
        result = model(torch.ones(2, 4))
        outputs.append(weakref.ref(result))
        return result.sum()

    assert kept_for_backward(forward) == 4 * (2 * 4 + 2 * 8)
    gc.collect()
    assert outputs[0]() is None
