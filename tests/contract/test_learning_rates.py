"""The rate that suits blocks, and the warning of an optimizer whose rate is far below it."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import diablo
from diablo import DiabloConfig, LowLearningRateWarning, suggested_learning_rate


class Layers(nn.Module):
    """Layers with 32, 32 and 128 inputs, rows of length 5, 5 and 10, and a table of 50 vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.wide = nn.Linear(32, 128)
        self.flat = nn.Linear(32, 32)
        self.down = nn.Linear(128, 32)
        with torch.no_grad():
            for layer, gain in ((self.wide, 5.0), (self.flat, 5.0), (self.down, 10.0)):
                layer.weight.mul_(gain / layer.weight.norm(dim=1, keepdim=True))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        found = self.down(torch.relu(self.wide(self.flat(self.table(ids)))))
        return {"loss": found.square().mean(), "logits": found}


def adapted(*targets: str, num_blocks: int = 4) -> Any:
    return get_peft_model(Layers(), DiabloConfig(num_blocks=num_blocks, target_modules=list(targets)))


def rates_warned_of(step: Any, times: int = 1) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            step()
    return [str(each.message) for each in caught if issubclass(each.category, LowLearningRateWarning)]


def step_of(model: Any, optimizer: torch.optim.Optimizer) -> Any:
    def step() -> None:
        model(torch.tensor([[1, 2, 3]]))["loss"].backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(
    ("targets", "num_blocks", "rate"),
    [
        (("flat",), 4, 0.035 * 5 / 8),
        (("flat",), 8, 0.035 * 5 / 4),
        (("down",), 4, 0.035 * 10 / 32),
        (("wide", "flat", "down"), 4, 0.035 * 5 / 8),
        (("table", "down"), 4, 0.035 * 10 / 32),
    ],
)
def test_the_suggested_rate_moves_the_output_of_the_median_layer_by_a_few_percent(
    targets: tuple[str, ...], num_blocks: int, rate: float
) -> None:
    assert suggested_learning_rate(adapted(*targets, num_blocks=num_blocks)) == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize(
    ("steps", "share"), [(None, 1), (10_000, 1), (200, 0.8), (50, 0.5), (24, 24 / 74), (1, 24 / 74)]
)
def test_a_short_run_wants_a_lower_rate(steps: int | None, share: float) -> None:
    assert suggested_learning_rate(adapted("flat"), steps=steps) == pytest.approx(share * 0.035 * 5 / 8, rel=0.03)


def test_the_suggested_rate_goes_with_the_scale_that_an_equal_model_gives_its_inputs() -> None:
    model = adapted("flat", "wide")
    before = suggested_learning_rate(model)
    for layer in (model.base_model.model.flat, model.base_model.model.wide):
        layer.get_base_layer().weight.data.mul_(4)
    assert suggested_learning_rate(model) == pytest.approx(4 * before, rel=0.05)


def test_the_suggested_rate_reads_rows_the_same_in_every_kind_of_layer() -> None:
    linear = nn.Sequential(nn.Linear(32, 128))
    turned = nn.Sequential(Conv1D(128, 32))
    turned[0].weight.data = linear[0].weight.data.T.contiguous()
    config = {"num_blocks": 4, "target_modules": ["0"]}
    rates = [suggested_learning_rate(get_peft_model(each, DiabloConfig(**config))) for each in (linear, turned)]
    assert rates[0] == rates[1]


def test_weights_that_are_not_there_have_no_suggested_rate() -> None:
    with torch.device("meta"):
        model = get_peft_model(Layers(), DiabloConfig(num_blocks=4, target_modules=["flat"]))
    with pytest.raises(ValueError, match="whose weights are in memory and whole"):
        suggested_learning_rate(model)


def test_a_model_without_blocks_on_linear_layers_has_no_suggested_rate() -> None:
    for model, name in ((Layers(), "default"), (adapted("flat"), "other"), (adapted("table"), "default")):
        with pytest.raises(ValueError, match=f"no blocks of an adapter '{name}' on linear layers"):
            suggested_learning_rate(model, name)


def test_a_rate_that_suits_lora_is_warned_of_once_with_the_rate_to_take() -> None:
    model = adapted("flat", "wide")
    step = step_of(model, torch.optim.AdamW(model.parameters(), lr=2e-4))
    (message,) = rates_warned_of(step, times=3)
    assert message.startswith("The learning rate is 0.0002")
    assert "start from 0.022," in message
    assert not rates_warned_of(step_of(model, torch.optim.AdamW(model.parameters(), lr=2e-4)))


def test_the_rate_after_warm_up_is_what_counts() -> None:
    model = adapted("flat")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert not rates_warned_of(step_of(model, optimizer), times=2)


def test_other_optimizers_and_other_models_are_not_warned_of() -> None:
    model, other = adapted("flat"), Layers()
    assert not rates_warned_of(step_of(other, torch.optim.AdamW(other.parameters(), lr=2e-4)))
    # What a step of SGD moves depends on the gradient, so that its rate says nothing.
    assert not rates_warned_of(step_of(model, torch.optim.SGD(model.parameters(), lr=2e-4)))
    embedding = adapted("table")
    assert not rates_warned_of(step_of(embedding, torch.optim.AdamW(embedding.parameters(), lr=2e-4)))


def test_an_adapter_that_is_added_later_is_looked_at_too() -> None:
    model = adapted("flat")
    model.add_adapter("second", DiabloConfig(num_blocks=8, target_modules=["flat"]))
    model.set_adapter("second")
    trained = [each for each in model.parameters() if each.requires_grad]
    (message,) = rates_warned_of(step_of(model, torch.optim.Adam(trained, lr=2e-4)))
    assert "start from 0.044," in message


def test_looking_keeps_no_model_alive_and_ends_with_it() -> None:
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    first = adapted("flat")
    gc.collect()
    before = len(_global_optimizer_pre_hooks)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    second = adapted("flat")
    assert len(_global_optimizer_pre_hooks) <= before
    del second


def test_two_models_are_each_warned_of_and_one_may_go_in_the_middle_of_a_step() -> None:
    first, second, third = adapted("flat"), adapted("wide"), adapted("flat")
    steps = [step_of(model, torch.optim.AdamW(model.parameters(), lr=2e-4)) for model in (first, second)]
    assert [len(rates_warned_of(step)) for step in steps] == [1, 1]
    kept = [third]
    optimizer = torch.optim.AdamW(second.parameters(), lr=1.0)
    handle = register_optimizer_step_pre_hook(lambda *_: kept.clear())
    del third
    try:
        step_of(second, optimizer)()
    finally:
        handle.remove()


def test_the_trainer_of_transformers_is_warned_at_its_default_rate_and_not_at_the_suggested_one(tmp_path: Path) -> None:
    rows = [{"ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([0])} for _ in range(4)]
    for given in (None, "suggested"):
        model = adapted("flat", "wide")
        rate = {} if given is None else {"learning_rate": diablo.suggested_learning_rate(model)}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, warmup_steps=2, report_to="none", use_cpu=True, save_strategy="no", **rate
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        messages = rates_warned_of(trainer.train)
        assert len(messages) == (given is None), messages
        if given is None:
            assert messages[0].startswith("The learning rate is 5e-05")
