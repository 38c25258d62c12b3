"""Blocks in fused experts while training: the losses and gradients of the copies that have them added."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from references import SavedBytes
from test_experts import adapted, config, every_mixture, fill, gpt_oss, layers, mixtral
from tiny_models import assert_same_bits, base_weights
from torch import nn

from diablo import preview_targets

TOLERANCE = 1e-5


def twins(build, **settings) -> list[nn.Module]:
    """Two models with the same blocks: in the parameters, and added to copies of them."""
    return [adapted(build, in_place=in_place, **settings).train() for in_place in (True, False)]


def ids(seed: int) -> torch.Tensor:
    return torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return model(input_ids=ids(seed)).logits.square().mean()


def in_weight(model: nn.Module) -> set[bool]:
    plans = {layer: layer.passes.plan([layer]) for layer in layers(model).values()}
    return {plan.writes and layer.number in plan.held for layer, plan in plans.items()}


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    pairs = [(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True) if q.grad is not None]
    assert len(pairs) >= 2
    for got, expected in pairs:
        assert expected.grad.norm() > 0
        assert (got.grad - expected.grad).norm() <= TOLERANCE * expected.grad.norm()


@every_mixture
def test_losses_and_gradients_are_those_of_the_copies(build):
    models = twins(build)
    losses = [loss_of(model, 1) for model in models]
    assert in_weight(models[0]) == {True}
    assert in_weight(models[1]) == {False}
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=TOLERANCE)
    for loss in losses:
        loss.backward()
    assert_same_gradients(*models)


@every_mixture
def test_no_copy_of_the_parameters_is_made_and_none_is_kept(build):
    base = build().requires_grad_(False)
    embedded = torch.randn(2, 7, 16, requires_grad=True)
    with SavedBytes(base) as frozen:
        base(inputs_embeds=embedded)
    kept = []
    for model in twins(build):
        with SavedBytes(model) as saved:
            model(inputs_embeds=embedded)
        kept.append(saved.total - frozen.total)
    experts = base.model.layers[0].mlp.experts
    copies = 2 * sum(p.numel() * p.element_size() for p in (experts.gate_up_proj, experts.down_proj))
    assert kept[1] - kept[0] >= copies


@every_mixture
@pytest.mark.parametrize("between", ["forward", "reference", "reference in the loss", "state dict", "another adapter"])
def test_what_comes_between_a_forward_and_its_backward(build, between):
    models = twins(build)
    for model in models:
        model.enable_input_require_grads()
        if between == "another adapter":
            in_place = model.peft_config["default"].in_place
            model.add_adapter("other", config(num_blocks=3, in_place=in_place))
            fill(model, "other", seed=5)
            model.set_adapter("default")
        loss = loss_of(model, 1)
        if between == "forward":
            loss = F.softplus(loss - loss_of(model, 2))
        elif between == "reference":
            with torch.no_grad(), model.disable_adapter():
                loss_of(model, 1)
        elif between == "reference in the loss":
            with model.disable_adapter():
                loss = loss + 0.5 * loss_of(model, 2)
        elif between == "state dict":
            model.state_dict()
        else:
            model.base_model.set_adapter(["default", "other"])
            loss = loss + loss_of(model, 2)
        loss.backward()
    assert_same_gradients(*models)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    models = twins(mixtral)
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        loss_of(model, 1).backward()
    assert in_weight(models[0]) == {True}
    assert_same_gradients(*models)


@every_mixture
def test_training_walks_the_same_way_and_leaves_every_bit_of_the_base(build):
    models = twins(build)
    before = base_weights(models[0])
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in models]
    for seed in range(6):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)
    frozen = {name for name in before if "diablo_" not in name}
    after = base_weights(models[0])
    assert_same_bits({n: after[n] for n in frozen}, {n: before[n] for n in frozen})
    assert_same_bits(dict(models[0].unload().state_dict()), dict(build().state_dict()))


def test_blocks_overwritten_between_forward_and_backward_are_an_error():
    model = twins(mixtral)[0]
    loss = loss_of(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_holds_its_own():
    model = twins(gpt_oss)[0]
    loss_of(model, 1)
    twin = copy.deepcopy(model)
    loss_of(twin, 1).backward()
    assert in_weight(twin) == {True}
    assert loss_of(twin, 2).item() == pytest.approx(loss_of(model, 2).item(), rel=TOLERANCE)


def test_under_the_compiler_it_is_outside_of_the_graph_where_asked_for_and_makes_copies_where_left_open():
    torch._dynamo.reset()

    def build() -> nn.Module:
        return mixtral(layers=1)

    asked, _ = twins(build)
    left_open, beside = adapted(build).train(), adapted(build, in_place=False).train()
    before = base_weights(asked)
    for model in (asked, left_open):
        loss_of(torch.compile(model, backend="aot_eager"), 1).backward()
    loss_of(beside, 1).backward()
    assert_same_bits(base_weights(asked), before)
    assert_same_gradients(asked, beside)
    assert_same_gradients(left_open, beside)


def test_the_preview_says_that_they_are_written_into():
    assert set(preview_targets(mixtral(), config()).obstacles.values()) == {None}
