"""Blocks in the weight while training: the losses and gradients of the beside path, in everything that users do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from references import SavedBytes
from tiny_models import CASES, assert_same_bits, base_weights, fill, llama, mlp, output, tuner_layers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from versions import saves_biases

from diablo import DiabloConfig, preview_targets
from diablo.tuner.layers.in_place import compiled_linear

BY_NAME = {case.name: case for case in CASES}
LINEAR = ["mlp", "ragged", "overhang", "conv1d", "llama", "gpt2"]
every_linear_case = pytest.mark.parametrize("name", LINEAR)
TOLERANCE = 1e-5
BECOME_IMPOSSIBLE = r"in_place=True has become impossible for this Linear \(weight of 16 -> 24\)"


def twins(name: str, dtype: torch.dtype = torch.float32, **settings) -> tuple[PeftModel, PeftModel]:
    """Two models with the same blocks: in the weight, and beside it."""
    case = BY_NAME[name]
    models = [case.adapted(dtype, in_place=in_place, **settings).train() for in_place in (True, False)]
    assert all(layer._can_hold for layer in tuner_layers(models[0]).values())
    return models[0], models[1]


def inputs(model: PeftModel, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inner = model.get_base_model()
    if hasattr(inner, "up"):
        up = inner.up.get_base_layer()
        width = up.nx if hasattr(up, "nx") else up.in_features
        return torch.randn(4, 3, width, generator=generator).to(inner.head.weight.dtype)
    return torch.randint(32, (4, 7), generator=generator)


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.is_floating_point():
        return model(x)
    return model(input_ids=x).logits


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = forward(model, x).float()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return (y * weights).mean() + y.square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    got, expected = gradients(one), gradients(other)
    assert got.keys() == expected.keys()
    assert got
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert_near(got[name], gradient)


def in_weight(model: nn.Module) -> set[bool]:
    """Whether a pass has the blocks of the layers in their weights."""
    plans = {layer: layer.passes.plan([layer]) for layer in tuner_layers(model).values()}
    return {plan.writes and layer.number in plan.held for layer, plan in plans.items()}


@every_linear_case
def test_losses_and_gradients_are_those_of_the_beside_path(name):
    inside, beside = twins(name)
    x = inputs(inside, 1)
    losses = [loss_of(model, x) for model in (inside, beside)]
    assert in_weight(inside) == {True}
    assert in_weight(beside) == {False}
    assert_near(*losses)
    for loss in losses:
        loss.backward()
    assert_same_gradients(inside, beside)


@every_linear_case
def test_the_gradient_of_the_input_is_that_of_the_beside_path(name):
    for layers in zip(*(tuner_layers(model).values() for model in twins(name)), strict=True):
        got = []
        for layer in layers:
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3), requires_grad=True)
            layer(x).square().sum().backward()
            got.append(x.grad)
        assert_near(*got)


def test_second_derivatives_are_those_of_the_dense_weight():
    inside, _ = twins("ragged", torch.float64)
    layer = next(iter(tuner_layers(inside).values()))
    base, blocks = layer.get_base_layer(), layer.diablo_blocks["default"]
    weight = base.weight.detach().clone()
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    y = layer(x)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(grad_x.square().sum(), blocks)
    layout = layer.diablo_layout["default"]
    dense = blocks.detach().clone().requires_grad_()
    delta = torch.zeros_like(weight)
    for tile in layout.tiles:
        rows = tile.of_weight(torch.arange(weight.numel()).reshape(weight.shape))
        delta = delta.flatten().index_put((rows.flatten(),), tile.of_blocks(dense).flatten()).reshape(weight.shape)
    plain = F.linear(x, weight + delta, base.bias)
    (grad_x,) = torch.autograd.grad(plain.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad_x.square().sum(), dense)
    assert_near(got, expected, 1e-12)


@every_linear_case
def test_gradients_accumulate(name):
    models = twins(name)
    for model in models:
        for seed in range(3):
            loss_of(model, inputs(model, seed)).backward()
    assert_same_gradients(*models)


@every_linear_case
def test_two_forwards_before_one_backward(name):
    models = twins(name)
    for model in models:
        chosen, rejected = (loss_of(model, inputs(model, seed)) for seed in (1, 2))
        F.softplus(chosen - rejected).backward()
    assert_same_gradients(*models)


@every_linear_case
def test_a_reference_forward_without_the_adapter_between_forward_and_backward(name):
    """DPO: the policy's forward, the reference's with the adapter off, then the policy's backward."""
    models = twins(name)
    plain = BY_NAME[name].base(torch.float32)
    for model in models:
        x = inputs(model, 1)
        loss = loss_of(model, x)
        with torch.no_grad(), model.disable_adapter():
            reference = forward(model, x)
            assert in_weight(model) == {False}
        assert_near(reference, forward(plain, x))
        (loss * (1 + reference.float().mean())).backward()
    assert_same_gradients(*models)


@every_linear_case
def test_a_forward_without_the_adapter_that_is_part_of_the_loss(name):
    models = twins(name)
    for model in models:
        x = inputs(model, 1)
        if x.is_floating_point():
            x.requires_grad_()
        else:
            model.enable_input_require_grads()
        loss = loss_of(model, x)
        with model.disable_adapter():
            loss = loss + 0.5 * loss_of(model, x)
        loss.backward()
    assert_same_gradients(*models)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name, use_reentrant):
    models = twins(name)
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        loss_of(model, inputs(model, 1)).backward()
    assert_same_gradients(*models)
    loss_of(twins(name)[1], inputs(models[0], 1)).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_single_layer(use_reentrant):
    gradients_of = []
    for model in twins("ragged"):
        layer = next(iter(tuner_layers(model).values()))
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3), requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        with model.disable_adapter(), torch.no_grad():
            layer(x)
        y.square().sum().backward()
        gradients_of.append([x.grad, layer.diablo_blocks["default"].grad])
    for got, expected in zip(*gradients_of, strict=True):
        assert_near(got, expected)


class WritesBehindAutograd(torch.optim.Optimizer):
    """What 8-bit and fused optimizers do: the new values are written where no version counter sees it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                version = parameter._version
                values = parameter.data.numpy()
                values -= group["lr"] * parameter.grad.numpy()
                assert parameter._version == version


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "raw pointers": lambda p: WritesBehindAutograd(p, lr=0.1),
}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model, optimizer, seed) -> float:
    optimizer.zero_grad()
    loss = loss_of(model, inputs(model, seed))
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["ragged", "llama", "gpt2"])
def test_every_optimizer_walks_the_same_way(name, optimizer):
    models = twins(name)
    losses = []
    for model in models:
        built = OPTIMIZERS[optimizer](trainable(model))
        losses.append([step(model, built, seed % 3) for seed in range(12)])
    assert losses[0][-3:] != losses[0][:3]
    for one, other in zip(*losses, strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["ragged", "llama"])
def test_evaluating_saving_copying_disabling_and_switching_in_mid_training(name, tmp_path):
    """All of it between the steps of a run, which ends where the undisturbed beside run ends."""
    case = BY_NAME[name]
    inside, beside = twins(name)
    plain = case.base(torch.float32)
    pristine = {key: value.clone() for key, value in plain.state_dict().items()}
    optimizers = [torch.optim.AdamW(trainable(model), lr=1e-2) for model in (inside, beside)]
    for seed in range(8):
        losses = [step(model, built, seed) for model, built in zip((inside, beside), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
        inside.eval()
        assert_near(output(inside), output(beside.eval()))
        inside.train()
        beside.train()
        with inside.disable_adapter():
            assert_same_bits(base_weights(inside), pristine_of(inside, pristine))
            for layer_name, layer in tuner_layers(inside).items():
                assert torch.equal(layer.get_base_layer().weight, pristine[f"{layer_name}.weight"])
            assert torch.equal(output(inside.eval()), output(plain))
            inside.train()
        if seed == 2:
            inside.save_pretrained(tmp_path)
            loaded = PeftModel.from_pretrained(case.base(torch.float32), tmp_path).eval()
            assert_near(output(loaded), output(beside.eval()))
            beside.train()
        if seed == 3:
            for twin in (copy.deepcopy(inside), pickle.loads(pickle.dumps(inside))):
                assert_near(output(twin.eval()), output(inside.eval()))
                loss_of(twin.train(), inputs(twin, 1)).backward()
                assert in_weight(twin) == {True}
            inside.train()
            inside.zero_grad()
        if seed == 4:
            inside.add_adapter("other", case.other_config())
            fill(inside, "other", seed=5)
            inside.set_adapter("other")
            loss_of(inside, inputs(inside, 1)).backward()
            inside.zero_grad()
            inside.base_model.set_adapter(["default", "other"])
            loss_of(inside, inputs(inside, 1)).backward()
            inside.zero_grad()
            inside.set_adapter("default")
            inside.delete_adapter("other")
        if seed == 5:
            state = {key: value.clone() for key, value in inside.state_dict().items()}
            inside.load_state_dict(state)
    merged = inside.merge_and_unload().eval()
    assert_near(output(merged), output(beside.eval()))


def pristine_of(model, pristine):
    return {name: pristine[name] for name in base_weights(model)}


@pytest.mark.parametrize("name", ["ragged", "llama"])
def test_two_active_adapters_get_the_gradients_of_the_beside_path(name):
    models = twins(name)
    for model in models:
        case = BY_NAME[name]
        model.add_adapter("other", case.config(num_blocks=3, in_place=next(iter(model.peft_config.values())).in_place))
        fill(model, "other", seed=5)
        model.base_model.set_adapter(["default", "other"])
        loss_of(model, inputs(model, 1)).backward()
    assert_same_gradients(*models)
    assert in_weight(models[0]) == {True}
    models[0].unload()


@every_linear_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_unloading_after_training_leaves_every_bit_of_the_base(name, dtype):
    case = BY_NAME[name]
    before = {key: value.clone() for key, value in case.base(dtype).state_dict().items()}
    model = case.adapted(dtype).train()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    assert in_weight(model) == {True}
    assert_same_bits(dict(model.unload().state_dict()), before)


@every_linear_case
def test_in_bf16_the_output_is_that_of_the_merged_model_to_the_bit(name):
    model = BY_NAME[name].adapted(torch.bfloat16)
    inside = output(model)
    model.merge_adapter()
    if name in ("conv1d", "gpt2"):
        # Conv1D computes its product with the weight in another order of strides.
        assert_near(output(model), inside, 1e-2)
    else:
        assert torch.equal(output(model), inside)


@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_bf16_training_does_not_stall_from_rounding(name):
    """Updates far below a bf16 weight's spacing add up, since the blocks are kept in fp32."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = BY_NAME[name].adapted(torch.bfloat16).to(dtype).train()
        for parameter in trainable(model):
            parameter.data = parameter.data.float() * 0
        optimizer = torch.optim.AdamW(trainable(model), lr=3e-4, weight_decay=0)
        target = torch.Generator().manual_seed(4)
        wanted = None
        trace = []
        for _ in range(200):
            optimizer.zero_grad()
            y = forward(model, inputs(model, 1)).float()
            wanted = torch.randn(y.shape, generator=target) if wanted is None else wanted
            loss = F.mse_loss(y, wanted)
            loss.backward()
            optimizer.step()
            trace.append(loss.item())
        assert in_weight(model) == {True}
        losses[dtype] = trace
    exact, rounded = losses[torch.float32], losses[torch.bfloat16]
    assert exact[-1] < 0.97 * exact[0], "nothing was learned"
    assert rounded[-1] == pytest.approx(exact[-1], rel=1e-2)
    assert rounded[0] - rounded[-1] > 0.8 * (exact[0] - exact[-1])


@pytest.mark.parametrize("name", ["ragged", "llama"])
def test_autocast(name):
    models = twins(name)
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, inputs(model, 1))
        loss.backward()
    assert in_weight(models[0]) == {True}
    for key, gradient in gradients(models[1]).items():
        assert gradient.dtype == torch.float32
        assert_near(gradients(models[0])[key], gradient, 0.05)


@saves_biases
def test_a_trained_bias():
    models = twins("ragged", bias="all")
    for model in models:
        loss_of(model, inputs(model, 1)).backward()
    assert any(name.endswith("bias") for name in gradients(models[0]))
    assert_same_gradients(*models)


# Under the compiler.


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["ragged", "conv1d", "llama"])
def test_compiled_training_walks_the_same_way(name, backend):
    torch._dynamo.reset()
    inside, beside = twins(name)
    compiled = torch.compile(inside, backend=backend)
    optimizers = [OPTIMIZERS["raw pointers"](trainable(model)) for model in (inside, beside)]
    for seed in range(4):
        losses = [step(model, built, seed) for model, built in zip((compiled, beside), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    assert in_weight(inside) == {True}
    assert_same_gradients(inside, beside)
    with inside.disable_adapter():
        assert_same_bits(base_weights(inside), base_weights(beside))
        assert_near(forward(compiled, inputs(inside, 1)), forward(BY_NAME[name].base(torch.float32), inputs(inside, 1)))
    losses = [step(model, built, 7) for model, built in zip((compiled, beside), optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    # Eager and compiled forwards take turns.
    losses = [step(model, built, 8) for model, built in zip((inside, beside), optimizers, strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["ragged", "llama"])
def test_two_compiled_forwards_before_one_backward(name, backend):
    torch._dynamo.reset()
    case = BY_NAME[name]
    # By default the blocks stand in the weight under the compiler too.
    models = [case.adapted(torch.float32).train(), case.adapted(torch.float32, in_place=False).train()]
    for model, run in zip(models, (torch.compile(models[0], backend=backend), models[1]), strict=True):
        # An eager forward first: it leaves the blocks in the weight.
        loss_of(model, inputs(model, 7)).backward()
        for first in (0, 2):
            chosen, rejected = (loss_of(run, inputs(model, seed)) for seed in (first, first + 1))
            F.softplus(chosen - rejected).backward()
    assert in_weight(models[0]) == {True}
    assert_same_gradients(*models)


@pytest.mark.parametrize("change", ["disabled", "switched", "another forward", "unloaded for a save"])
def test_another_weight_between_a_compiled_forward_and_its_backward(change):
    torch._dynamo.reset()
    models = twins("ragged")
    for model in models:
        config = BY_NAME["ragged"].config(in_place=model.peft_config["default"].in_place)
        model.add_adapter("other", config)
        fill(model, "other", seed=5)
        model.set_adapter("default")
    for model, run in zip(models, (torch.compile(models[0], backend="inductor"), models[1]), strict=True):
        loss = loss_of(run, inputs(model, 1))
        if change == "disabled":
            with torch.no_grad(), model.disable_adapter():
                reference = forward(run, inputs(model, 1))
            loss = loss * reference.square().mean()
        elif change == "switched":
            # Both: PEFT would freeze the one that is not active, and autograd then drops its gradient.
            model.base_model.set_adapter(["default", "other"])
            loss_of(run, inputs(model, 1))
        elif change == "another forward":
            loss_of(run, inputs(model, 2))
        else:
            model.state_dict()
        loss.backward()
    assert_same_gradients(*models)


def test_compiled_autocast():
    torch._dynamo.reset()
    models = twins("ragged", bias="none")
    for model, run in zip(models, (torch.compile(models[0]), models[1]), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(run, inputs(model, 1))
        loss.backward()
    assert in_weight(models[0]) == {True}
    for key, gradient in gradients(models[1]).items():
        assert_near(gradients(models[0])[key], gradient, 0.05)


@saves_biases
def test_a_trained_bias_under_the_compiler():
    torch._dynamo.reset()
    models = twins("ragged", bias="all")
    for model, run in zip(models, (torch.compile(models[0], backend="aot_eager"), models[1]), strict=True):
        loss_of(run, inputs(model, 1)).backward()
    assert any(name.endswith("bias") for name in gradients(models[0]))
    assert_same_gradients(*models)


def test_the_compiled_operator_is_what_the_compiler_takes_it_for():
    inside, _ = twins("ragged")
    layer = next(iter(tuner_layers(inside).values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    bias, blocks = layer.base_layer.bias, [layer.diablo_blocks["default"]]
    counts = [layer.diablo_layout["default"].num_blocks]
    sizes = (layer.in_features, layer.out_features)
    arguments = (x, bias, blocks, layer._number, "default", counts, *sizes, None)
    checks = torch.library.opcheck(compiled_linear, arguments)
    assert set(checks.values()) == {"SUCCESS"}


def test_layers_that_are_compiled_one_by_one_share_a_graph():
    torch._dynamo.reset()
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, use_cache=False
    )
    models = [
        fill(get_peft_model(LlamaForCausalLM(config), DiabloConfig(num_blocks=4, in_place=in_place))).train()
        for in_place in (True, False)
    ]
    models[1].load_state_dict(models[0].state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    for layer in models[0].get_base_model().model.layers:
        layer.compile(backend=counter)
    for model in models:
        model.enable_input_require_grads()
        loss_of(model, inputs(model, 1)).backward()
    assert counter.frame_count == 1
    assert in_weight(models[0]) == {True}
    assert_same_gradients(*models)


def test_a_weight_that_moves_under_a_compiled_graph_is_followed_and_a_replaced_one_an_error():
    torch._dynamo.reset()
    inside, beside = twins("mlp")
    compiled = torch.compile(inside, backend="aot_eager")
    loss_of(compiled, inputs(inside, 1)).backward()
    layer = next(iter(tuner_layers(inside).values()))
    layer.base_layer.weight.data = layer.base_layer.weight.data.clone()
    inside.zero_grad()
    for run, model in ((compiled, inside), (beside, beside)):
        loss_of(run, inputs(model, 1)).backward()
    assert_same_gradients(inside, beside)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match=BECOME_IMPOSSIBLE):
        loss_of(compiled, inputs(inside, 1))


def test_a_compiled_graph_keeps_the_inputs_and_no_weight():
    torch._dynamo.reset()
    inside, _ = twins("mlp")
    compiled = torch.compile(inside, backend="aot_eager")
    x = inputs(inside, 1)
    loss_of(compiled, x).backward()
    weights = {p.untyped_storage().data_ptr() for p in inside.parameters() if not p.requires_grad and p.dim() == 2}
    adapted = {layer.base_layer.weight.untyped_storage().data_ptr() for layer in tuner_layers(inside).values()}
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.add(tensor.untyped_storage().data_ptr()) or tensor, lambda tensor: tensor
    ):
        loss_of(compiled, x)
    assert adapted <= weights
    assert kept
    assert not kept & adapted


# What the layer keeps for backward.


class Attention(nn.Module):
    """Three layers that share their input, two that share another, and one more."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "gate", "up", "down"):
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, x):
        mixed = self.q(x) + self.k(x) + self.v(x)
        return self.down(self.gate(mixed) + self.up(mixed))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_kept_but_the_frozen_models_tensors_and_the_distinct_inputs(dtype, in_place):
    base = Attention().to(dtype).requires_grad_(False)
    x = torch.randn(7, 16, dtype=dtype, requires_grad=True)
    with SavedBytes(base) as frozen:
        base(x)
    names = ["q", "k", "v", "gate", "up", "down"]
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=names, in_place=in_place)).train()
    with SavedBytes(model) as adapted:
        model(x)
    element = x.element_size()
    distinct_inputs = 3 * 7 * 16 * element
    # Beside, the blocks in fp32 are cast to the activations' dtype, and autograd keeps nothing of that either.
    assert adapted.total == frozen.total + distinct_inputs


def test_a_whole_models_saved_bytes():
    base = llama().requires_grad_(False)
    embedded = torch.randn(2, 7, 16, requires_grad=True)
    with SavedBytes(base) as frozen:
        base(inputs_embeds=embedded)
    model = get_peft_model(base, DiabloConfig(num_blocks=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    with SavedBytes(model) as adapted:
        model.train()(inputs_embeds=embedded)
    tokens, layers = 14, 2
    # q, k and v read one tensor, and o another, of which the frozen model keeps neither.
    assert 0 < adapted.total - frozen.total <= layers * 2 * tokens * 16 * 4


# Where it is impossible.


def tied() -> nn.Module:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_own_forward() -> nn.Module:
    model = mlp()
    model.up = Own(16, 24)
    return model


def with_hook() -> nn.Module:
    model = mlp()
    model.up.register_forward_hook(lambda module, args, y: y * 2)
    return model


def a_slice() -> nn.Module:
    model = mlp()
    model.up.weight = nn.Parameter(torch.randn(48, 16)[:24])
    return model


IMPOSSIBLE = [
    (tied, "lm_head", {}, "the weight is shared by model.embed_tokens, lm_head"),
    (with_own_forward, "up", {}, "this Own has a forward of its own"),
    (with_hook, "up", {}, "hooks are registered"),
    (a_slice, "up", {}, "a part of a larger tensor"),
    (mlp, "up", {"diablo_dropout": 0.1}, "diablo_dropout=0.1"),
]


@pytest.mark.parametrize(("build", "target", "settings", "reason"), IMPOSSIBLE)
def test_what_is_impossible_is_refused_where_asked_for_and_stands_beside_otherwise(build, target, settings, reason):
    model = build()
    with pytest.raises(ValueError, match=reason) as caught:
        get_peft_model(model, DiabloConfig(num_blocks=4, target_modules=[target], in_place=True, **settings))
    assert "in_place='auto'" in str(caught.value)
    assert not tuner_layers(model), "nothing was changed"
    config = DiabloConfig(num_blocks=4, target_modules=[target], **settings)
    adapted = fill(get_peft_model(build(), config)).eval()
    beside = DiabloConfig(num_blocks=4, target_modules=[target], in_place=False, **settings)
    expected = fill(get_peft_model(build(), beside)).eval()
    assert torch.equal(output(adapted), output(expected))
    assert in_weight(adapted) == {False}


def test_a_weight_that_is_tied_after_the_adapter_was_added_stands_beside():
    model = fill(get_peft_model(llama(), DiabloConfig(num_blocks=4, target_modules=["lm_head"])))
    before = output(model)
    layer = next(iter(tuner_layers(model).values()))
    replaced = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
    layer.base_layer.weight = replaced
    assert_near(output(model), before)
    assert in_weight(model) == {False}


@pytest.mark.parametrize("change", ["a hook", "a replaced weight", "a trained weight"])
def test_what_has_become_impossible_is_an_error_where_it_was_asked_for(change):
    inside, _ = twins("mlp")
    layer = next(iter(tuner_layers(inside).values()))
    if change == "a hook":
        layer.base_layer.register_forward_hook(lambda module, args, y: y)
    elif change == "a replaced weight":
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
    else:
        layer.base_layer.weight.requires_grad_()
    with pytest.raises(RuntimeError, match=BECOME_IMPOSSIBLE):
        loss_of(inside, inputs(inside, 1))
    with inside.disable_adapter():
        loss_of(inside, inputs(inside, 1))


def test_an_adapter_that_is_not_trained_stands_beside(tmp_path):
    case = BY_NAME["llama"]
    case.adapted(torch.float32).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(case.base(torch.float32), tmp_path)
    output(model)
    assert in_weight(model) == {False}


def test_a_merge_between_forward_and_backward_is_an_error():
    inside, _ = twins("ragged")
    loss = loss_of(inside, inputs(inside, 1))
    with torch.no_grad(), inside.disable_adapter():
        loss_of(inside, inputs(inside, 1))
    inside.add_adapter("other", BY_NAME["ragged"].config(num_blocks=3))
    fill(inside, "other", seed=5)
    inside.merge_adapter(["other"])
    with pytest.raises(RuntimeError, match="other was merged between a forward and its backward"):
        loss.backward()


def test_blocks_overwritten_between_forward_and_backward_are_an_error():
    for model in twins("ragged"):
        loss = loss_of(model, inputs(model, 1))
        with torch.no_grad():
            for parameter in trainable(model):
                parameter.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_that_is_cast_in_mid_training_casts_its_own_weights(dtype):
    inside, _ = twins("ragged")
    loss_of(inside, inputs(inside, 1)).backward()
    inside.to(dtype)
    assert_same_bits(base_weights(inside), base_weights(BY_NAME["ragged"].base(torch.float32).to(dtype)))
    loss_of(inside, inputs(inside, 1)).backward()
    assert in_weight(inside) == {True}


def test_the_preview_says_where_the_blocks_will_stand():
    text = str(preview_targets(tied(), DiabloConfig(num_blocks=4, target_modules=["q_proj", "lm_head"])))
    assert "in the weight" in text
    assert "beside: the weight is shared" in text


def test_another_weight_where_the_old_one_was_is_not_taken_for_it():
    # As a wrapper does that shards weights and gathers them again, often into the memory that they have left.
    model = get_peft_model(mlp((8, 8, 8)), DiabloConfig(num_blocks=2, target_modules=["up"]))
    model(torch.ones(1, 8))
    assert in_weight(model) == {True}
    layer = model.base_model.model.up
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.data, requires_grad=False)
    model(torch.ones(1, 8))
    assert in_weight(model) == {False}
