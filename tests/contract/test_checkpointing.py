"""Selective gradient checkpointing: the gradients of a training without it, in less memory than the frozen model's."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import allocations
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from diablo import DiabloConfig
from diablo.models.checkpointing import SHORT_SUM, checkpointing_options, selective_contexts

METHODS: dict[str, Callable[[], Any]] = {
    "in place": lambda: DiabloConfig(num_blocks=8, in_place=True),
    "beside": lambda: DiabloConfig(num_blocks=8, in_place=False),
    "dropout": lambda: DiabloConfig(num_blocks=8, diablo_dropout=0.2),
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
}
IDS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
WIDE = SHORT_SUM + 32


def llama(dtype: torch.dtype = torch.float32, layers: int = 2, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDE,
        intermediate_size=2 * WIDE + 32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def adapted(method: str, choice: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = get_peft_model(llama(dtype, **options), METHODS[method]()).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.normal_(std=0.02, generator=generator)
    if choice != "none":
        model.gradient_checkpointing_enable(checkpointing_options(choice))
    return model


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    torch.manual_seed(2)  # for dropout
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: Any, steps: int = 2) -> tuple[float, dict[str, torch.Tensor]]:
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in trained(model).items()}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert values.any(), name
        assert torch.equal(got[name], values), name


@pytest.mark.parametrize("choice", ["none", "full"])
@pytest.mark.parametrize("method", ["in place", "beside"])
def test_what_the_backward_needs_can_wait_in_another_memory(method, choice):
    """As with TRL's ``activation_offloading``: what is saved for a backward is handed over and comes back as a copy."""
    expected = gradients(adapted(method, choice))
    model = adapted(method, choice)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inputs, moved = set(), set()

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor
        moved.add(tensor.data_ptr())
        return tensor.clone()

    layers = [module for name, module in model.named_modules() if name.endswith(("q_proj", "up_proj", "down_proj"))]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.add(args[0].data_ptr()))
    with torch.autograd.graph.saved_tensors_hooks(move, lambda tensor: tensor):
        loss, found = gradients(model)
    assert loss == expected[0]
    assert_same_bits(found, expected[1])
    if choice == "none":
        assert len(inputs) >= 2
        assert inputs <= moved
    else:
        assert moved


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_without_checkpointing_to_the_bit(method, dtype, attention):
    plain, expected = gradients(adapted(method, "none", dtype, attention=attention))
    for choice in ("selective", "full"):
        loss, got = gradients(adapted(method, choice, dtype, attention=attention))
        assert loss == plain
        assert_same_bits(got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_right_where_the_adapter_was_off_before_the_backward(method):
    # The recomputation has to write blocks into the weights that stood there in the forward.
    _, expected = gradients(adapted(method, "none"), steps=1)
    model = adapted(method, "selective")
    loss = loss_of(model)
    with model.disable_adapter(), torch.no_grad():
        loss_of(model)
    loss.backward()
    assert_same_bits({name: parameter.grad for name, parameter in trained(model).items()}, expected)


@pytest.mark.parametrize("method", ["in place", "beside", "lora"])
def test_a_graph_can_be_gone_through_twice(method):
    _, expected = gradients(adapted(method, "none"), steps=1)
    model = adapted(method, "selective")
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_same_bits({name: parameter.grad for name, parameter in trained(model).items()}, expected)


def used(model: Any) -> tuple[int, int]:
    ids = torch.randint(64, (2, 128), generator=torch.Generator().manual_seed(0))
    # What the first forward makes for good, such as the base values of the diagonals, is no activation.
    loss_of(model, ids).backward()
    return allocations(lambda: loss_of(model, ids), lambda loss: loss.backward())


@functools.cache
def used_by_the_frozen_model(dtype: torch.dtype) -> tuple[int, int]:
    frozen = llama(dtype, layers=10).requires_grad_(False)
    frozen.enable_input_require_grads()
    return used(frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["in place", "beside", "lora"])
def test_no_more_is_kept_and_needed_than_by_the_frozen_model(method, dtype):
    kept, peak = used_by_the_frozen_model(dtype)
    own_kept, own_peak = used(adapted(method, "selective", dtype, layers=10))
    assert own_kept < kept
    assert own_peak < peak
    assert used(adapted(method, "none", dtype, layers=10))[0] > kept
    assert used(adapted(method, "full", dtype, layers=10))[0] < own_kept


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight)


def run(function: Callable[..., torch.Tensor], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4, WIDE, generator=generator), torch.randn(WIDE, WIDE, generator=generator)
    weight.requires_grad_()
    y = checkpoint(function, x, weight, use_reentrant=False, **options)
    (y.square().sum()).backward()
    return y.detach(), weight.grad


def test_what_is_overwritten_in_the_layer_is_kept_as_it_was():
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = product(x, weight)
        gate = y.sigmoid()
        y.view(-1)[::2].mul_(2)
        return gate * y

    for got, expected in zip(run(function, context_fn=selective_contexts), run(function), strict=True):
        assert torch.equal(got, expected)


def test_what_is_overwritten_after_the_layer_is_noticed():
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4, WIDE, generator=generator), torch.randn(WIDE, WIDE, requires_grad=True)

    results = []

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = product(x, weight)
        results.append(y.detach())
        return y.sigmoid() * y

    y = checkpoint(function, x, weight, use_reentrant=False, context_fn=selective_contexts)
    results[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"aten\.mm\.default, which selective .* was overwritten .* use full"):
        y.sum().backward()


def test_a_layer_that_computes_otherwise_the_second_time_is_noticed():
    times = iter([1, 2])

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = product(x, weight) if next(times) == 1 else torch.bmm(x[None], weight[None])[0]
        return y.sigmoid().exp()

    with pytest.raises(RuntimeError, match=r"found aten\.bmm\.default .* forward had aten\.mm\.default: .* use full"):
        run(function, context_fn=selective_contexts)


def test_short_products_and_attention_with_dropout_are_computed_again():
    def kept(function: Callable[[], Any]) -> list[bool]:
        forward, _ = selective_contexts()
        with forward:
            function()
        return [each.result is not None for each in forward.kept]

    tall = torch.ones(8, SHORT_SUM)
    assert kept(lambda: torch.mm(tall, torch.ones(SHORT_SUM, 8))) == [False]
    assert kept(lambda: torch.mm(torch.ones(8, WIDE), torch.ones(WIDE, 8))) == [True]
    assert kept(lambda: torch.addmm(torch.ones(8), torch.ones(8, WIDE), torch.ones(WIDE, 8))) == [True]
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    heads = torch.ones(1, 2, 8, 16)
    assert kept(lambda: attention(heads, heads, heads)) == [True]
    # The recomputation draws its numbers as the forward did; one draw less, and all after it are others.
    assert kept(lambda: attention(heads, heads, heads, dropout_p=0.0, is_causal=True)) == [True]
    with torch.device("meta"):
        heads = torch.ones(1, 2, 8, 16)
        assert kept(lambda: torch.ops.aten._scaled_dot_product_flash_attention(heads, heads, heads, 0.1)) == [False]
        assert kept(lambda: torch.ops.aten._scaled_dot_product_flash_attention(heads, heads, heads)) == [True]


def test_the_options_survive_pickling():
    assert checkpointing_options("none") is None
    for choice in ("selective", "full"):
        options = checkpointing_options(choice)
        assert pickle.loads(pickle.dumps(options)) == options
