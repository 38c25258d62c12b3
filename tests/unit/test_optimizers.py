"""Optimizers and schedules of a recipe: every name that transformers has, and what each is told."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, SchedulerType, get_scheduler
from transformers.training_args import OptimizerNames

from diablo.errors import UserError
from diablo.planning.making import make_plan
from diablo.planning.optimizers import choose_optimizer, state_bytes
from diablo.planning.schedules import choose_schedule
from diablo.recipes.reading import load_recipe
from diablo.recipes.training import (
    OPTIMIZERS,
    OUR_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    REFUSED_SCHEDULES,
    SCHEDULES,
    Optimizer,
    ParameterGroup,
    Training,
)
from diablo.training import train

CPU = torch.device("cpu")
PACKAGES = {
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
}
ABSENT = {name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None}


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """A recipe of two steps."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n} and {n}?", "completion": f" x = {n}"}) for n in range(8)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{train: {rows}}}\nmethod: {{name: diablo, num_blocks: 4}}\n"
        "training: {learning_rate: 1.0e-2, batch_size: 4, schedule: constant}\n"
        f"precision: fp32\noutput: {tmp_path / 'run'}\n"
    )
    return path


def refusal(recipe: Path, *overrides: str) -> str:
    """The one line that a recipe is refused with, before anything is loaded."""
    with pytest.raises(UserError) as caught:
        make_plan(load_recipe(recipe, overrides))
    (line,) = str(caught.value).splitlines()
    return line


def parts_of(value: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor is made of, such as codes and scales."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [getattr(value, name) for name in value.__tensor_flatten__()[0]]


RUNS_ON_A_CPU = [name for name in OPTIMIZERS if not name.startswith("paged_") and name not in ABSENT]


@pytest.mark.parametrize("name", RUNS_ON_A_CPU)
def test_the_plan_knows_what_an_optimizer_keeps(name: str) -> None:
    chosen = choose_optimizer(Training(optimizer=name), CPU)
    parameters = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((8, 64, 48), (2, 8, 8))]
    optimizer = chosen.kind(parameters, **chosen.arguments)
    for values in parameters:
        values.grad = torch.randn_like(values)
    # Those of torchao compile their step, which keeps the same.
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    kept = [
        part
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
        for part in parts_of(value)
    ]
    # Of a tensor in 8 bits there are its scales beside it, and bitsandbytes has a table of 256 levels.
    tables = [value for value in kept if value.numel() == 256 and value.dtype == torch.float32]
    real = sum(value.nbytes for value in kept if value.dim() > 0) - sum(table.nbytes for table in tables)
    assert state_bytes(Optimizer(name=name), parameters) == pytest.approx(real, rel=0.06, abs=64)


def test_every_optimizer_of_transformers_is_allowed_or_refused_with_a_reason() -> None:
    ours = set(OUR_OPTIMIZERS)
    assert ours <= set(OPTIMIZERS)
    assert sorted({*OPTIMIZERS, *REFUSED_OPTIMIZERS} - ours) == sorted(name.value for name in OptimizerNames)


def test_every_schedule_of_transformers_is_allowed_or_refused_with_a_reason() -> None:
    assert sorted([*SCHEDULES, *REFUSED_SCHEDULES]) == sorted(name.value for name in SchedulerType)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_is_allowed_trains_or_says_what_it_needs(recipe: Path, tmp_path: Path, name: str) -> None:
    setting = f"training.optimizer={name}"
    if name in ABSENT:
        line = refusal(recipe, setting)
        assert line.startswith(f"training.optimizer: found '{name}', whose package is not installed: ")
        assert "pip install" in line
        return
    if name.startswith("paged_") and not torch.cuda.is_available():
        assert "out of a GPU's memory, and there is no GPU with a memory of its own; take '" in refusal(recipe, setting)
        return
    # Without this, bitsandbytes keeps the state of tensors as small as these in fp32.
    small = ["training.optimizer.options.min_8bit_size=16"] if "8bit" in name and "torch" not in name else []
    # What torchao compiles takes longer to compile than to run.
    torch.compiler.set_stance("force_eager")
    try:
        record = train(load_recipe(recipe, [setting, *small])).record["training"]
    finally:
        torch.compiler.set_stance("default")
    assert record["steps"] == 2
    assert record["optimizer"]["name"] == name
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(values).all()) for values in trained.values())
    assert all(bool(values.abs().max() > 0) for values in trained.values())


@pytest.mark.parametrize(
    ("name", "bytes_of_a_value"),
    [
        ("adamw_torch_fused", 8),
        ("adamw_8bit", 2.03),
        ("lion_32bit", 4),
        ("lion_8bit", 1.02),
        ("muon", 4),
        # A row and a column of second moments for each block of 32 x 32 values.
        ("adafactor", 0.25),
    ],
)
def test_the_state_for_a_trained_value_takes_as_many_bytes_as_is_said(name: str, bytes_of_a_value: float) -> None:
    blocks = torch.nn.Parameter(torch.zeros(64, 32, 32))
    choice = choose_optimizer(Training(optimizer=Optimizer(name=name)), CPU)
    optimizer = choice.kind([blocks], **choice.arguments)
    blocks.grad = torch.ones_like(blocks)
    optimizer.step()
    # The table from a byte to its value is one for all parameters.
    state = {key: value for key, value in optimizer.state[blocks].items() if not key.startswith("qmap")}
    found = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    assert found / blocks.numel() == pytest.approx(bytes_of_a_value, rel=0.01)


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_an_optimizer_that_is_refused_says_why(recipe: Path, name: str) -> None:
    assert refusal(recipe, f"training.optimizer={name}") == (
        f"training.optimizer: found '{name}', which {REFUSED_OPTIMIZERS[name]}."
    )


@pytest.mark.parametrize("name", REFUSED_SCHEDULES)
def test_a_schedule_that_is_refused_says_why(recipe: Path, name: str) -> None:
    assert refusal(recipe, f"training.schedule={name}") == (
        f"training.schedule: found '{name}', which {REFUSED_SCHEDULES[name]}."
    )


def test_adamw_in_8_bits_is_named_where_a_paged_one_has_nothing_to_page() -> None:
    for paged, plain in (
        ("adamw_8bit", "adamw_8bit"),
        ("adamw_32bit", "adamw_torch_fused"),
        ("ademamix_32bit", "ademamix"),
    ):
        with pytest.raises(UserError, match=f"take '{plain}'"):
            choose_optimizer(Training(optimizer=Optimizer(name=f"paged_{paged}")), CPU)
        assert plain in OPTIMIZERS


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ("{name: sgd, betas: [0.9, 0.95]}", ["optimizer.betas: sgd has no betas; leave them out"]),
        (
            "{name: adamw_torch, betas: [0.9, 0.95, 0.99]}",
            ["optimizer.betas: found [0.9, 0.95, 0.99]", "has 2 of them"],
        ),
        ("{name: ademamix, betas: [0.9, 0.95]}", ["has 3 of them, by default [0.9, 0.999, 0.9999]"]),
        ("{name: lion_8bit, epsilon: 1e-8}", ["optimizer.epsilon: lion_8bit has no epsilon"]),
        ("{name: adafactor, epsilon: 1e-8}", ["optimizer.epsilon: adafactor has no epsilon"]),
        (
            "{name: sgd, options: {momentun: 0.9}}",
            ["options.momentun: sgd has no such option", "Did you mean momentum?"],
        ),
        ("{name: sgd, options: {momentum: fast}}", ["options.momentum: found 'fast'; allowed: a number, by default 0"]),
        ("{name: sgd, options: {nesterov: 1}}", ["options.nesterov: found 1; allowed: true or false"]),
        ("{name: sgd, options: {nesterov: true}}", ["sgd does not take its settings: Nesterov momentum requires"]),
        ("{name: adafactor, options: {eps: [1e-30]}}", ["options.eps: found [1e-30]; allowed: a list of 2"]),
        ("{name: muon, options: {ns_step: 3}}", ["options.ns_step: muon has no such option", "mean ns_steps?"]),
        ("{name: muon, options: {ns_steps: 2.5}}", ["muon does not take its settings: ns_steps must be an integer"]),
        ("{name: muon, options: {momentum: 1}}", ["momentum must be from 0 to below 1, and is 1"]),
        ("{options: {lr: 1}}", ["options.lr: write training.learning_rate in its place"]),
        ("{options: {eps: 1}}", ["options.eps: write training.optimizer.epsilon in its place"]),
        ("{options: {fused: true}}", ["options.fused: adamw_torch_fused has no such option; it takes amsgrad"]),
        ("{options: {maximize: true}}", ["options.maximize: adamw_torch_fused has no such option"]),
        # bitsandbytes would take these and do nothing.
        ("{name: adamw_8bit, options: {amsgrad: true}}", ["options.amsgrad: adamw_8bit has no such option"]),
        ("{name: rmsprop_bnb, options: {momentum: 0.9}}", ["options.momentum: rmsprop_bnb has no such option"]),
        (
            "{groups: [{modules: [embed_tokens], learning_rate: 1e-5}]}",
            ["groups: 'embed_tokens' of group 1 is in the name of no trained parameter"],
        ),
        (
            "{groups: [{modules: [q_proj], weight_decay: 0}, {modules: [self_attn], weight_decay: 1}]}",
            ["q_proj", "is in groups 1 and 2"],
        ),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(recipe: Path, settings: str, parts: list[str]) -> None:
    line = refusal(recipe, f"training.optimizer={settings}")
    assert line.startswith("training.optimizer")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            ["schedule=linear", "schedule_options={power: 2}"],
            ["schedule_options.power: linear has no such option; it takes none"],
        ),
        (["schedule=cosine", "schedule_options={num_cycle: 1}"], ["it takes num_cycles", "Did you mean num_cycles?"]),
        (["schedule=cosine", "schedule_options={num_cycles: x}"], ["num_cycles: found 'x'; allowed: a number above 0"]),
        (["schedule=polynomial", "schedule_options={lr_end: 1e-5}"], ["Its floor is training.min_learning_rate."]),
        (["schedule=warmup_stable_decay"], ["num_decay_steps: missing; warmup_stable_decay needs it"]),
        (
            ["schedule=warmup_stable_decay", "schedule_options={num_decay_steps: 2}", "warmup_steps=1"],
            ["warmup_stable_decay cannot be had in 2 steps with its steps of warmup and decay, which are 3 at least"],
        ),
        (
            ["schedule=warmup_stable_decay", "schedule_options={num_decay_steps: 1, decay_type: steep}"],
            ["does not take its settings", "steep"],
        ),
        (["schedule=polynomial", "warmup_steps=2"], ["polynomial cannot be had in 2 steps"]),
        (["schedule=polynomial", "learning_rate=1e-8"], ["polynomial does not take its settings: lr_end"]),
        (["min_learning_rate=1e-4"], ["min_learning_rate: constant has no floor; take schedule cosine"]),
        (["schedule=cosine_warmup_with_min_lr"], ["cosine_warmup_with_min_lr needs training.min_learning_rate"]),
    ],
)
def test_what_a_schedule_does_not_take_is_refused(recipe: Path, settings: list[str], parts: list[str]) -> None:
    line = refusal(recipe, *(f"training.{setting}" for setting in settings))
    assert line.startswith("training.")
    for part in parts:
        assert part in line


NEEDS: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"schedule_options": {"num_decay_steps": 4}},
    "cosine_warmup_with_min_lr": {"min_learning_rate": 1e-4},
}


def rates_of(training: Training, steps: int) -> list[float]:
    """The learning rate of every step, and the one that would come next."""
    choice = choose_schedule(training, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    options = dict(choice.options)
    schedule: Any = get_scheduler(choice.name, optimizer, training.warmup_steps, steps, options)
    return [training.learning_rate * schedule.lr_lambdas[0](step) for step in range(steps + 1)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_allowed_warms_up_and_ends_where_it_should(name: str) -> None:
    training = Training(schedule=name, learning_rate=1e-2, warmup_steps=4, **NEEDS.get(name, {}))
    rates = rates_of(training, 20)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[1] < rates[3] <= 1e-2
    if name == "cosine_warmup_with_min_lr":
        assert rates[-2] == pytest.approx(1e-4)
    elif name not in ("constant", "inverse_sqrt"):
        assert rates[-1] < 1e-6


@pytest.mark.parametrize("name", ["cosine", "polynomial", "warmup_stable_decay"])
def test_a_floor_is_where_the_schedule_ends(name: str) -> None:
    training = Training(schedule=name, learning_rate=1e-2, **{"min_learning_rate": 1e-3, **NEEDS.get(name, {})})
    rates = rates_of(training, 20)
    assert rates[-1] == pytest.approx(1e-3)
    assert min(rates) >= 1e-3 * (1 - 1e-9)


def test_options_of_a_schedule_arrive() -> None:
    rates = rates_of(Training(schedule="polynomial", learning_rate=1, schedule_options={"power": 2}), 10)
    assert rates[5] == pytest.approx(0.25, abs=1e-6)
    restarted = Training(schedule="cosine_with_restarts", learning_rate=1, schedule_options={"num_cycles": 2})
    assert rates_of(restarted, 10)[5] == pytest.approx(1)


def test_what_the_optimizer_is_told_arrives() -> None:
    settings = Optimizer(name="adamw_torch", betas=[0.8, 0.95], epsilon=1e-6, options={"amsgrad": True})
    choice = choose_optimizer(Training(optimizer=settings, learning_rate=3e-3), CPU)
    assert choice.kind is torch.optim.AdamW
    assert choice.arguments == {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "amsgrad": True}


def test_the_default_is_what_transformers_takes_where_it_is_told_nothing() -> None:
    from transformers import Trainer, TrainingArguments

    told = TrainingArguments(output_dir="unused", learning_rate=5e-4)
    choice = choose_optimizer(Training(), CPU)
    assert (choice.kind, choice.arguments) == Trainer.get_optimizer_cls_and_kwargs(told)
    assert choose_schedule(Training(), 10).describe() == {"name": told.lr_scheduler_type}


def test_groups_have_rates_and_decays_of_their_own(recipe: Path, tmp_path: Path) -> None:
    groups = (
        "[{modules: [layers.0.self_attn.q_proj, k_proj], learning_rate: 1e-4}, {modules: [mlp], weight_decay: 0.5}]"
    )
    overrides = [f"training.optimizer.groups={groups}", "training.weight_decay=0.1", "training.save_steps=2"]
    train(load_recipe(recipe, overrides))
    state = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    found = [(len(group["params"]), group["initial_lr"], group["weight_decay"]) for group in state["param_groups"]]
    # Two layers with five targets each.
    assert found == [(3, 1e-2, 0.1), (3, 1e-4, 0.1), (4, 1e-2, 0.5)]
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    # Two steps of AdamW at a constant rate move no value by more than twice the rate, and some by about as much.
    moved = {name: values.abs().max().item() for name, values in trained.items()}
    slow = [value for name, value in moved.items() if "k_proj" in name or "layers.0.self_attn.q_proj" in name]
    assert len(slow) == 3
    assert all(1e-4 < value < 2.1e-4 for value in slow)
    assert sum(value > 1e-2 for value in moved.values()) == 7


def test_a_name_of_a_group_stands_for_whole_parts_of_names(recipe: Path) -> None:
    assert "'proj' of group 1" in refusal(recipe, "training.optimizer.groups=[{modules: [proj], weight_decay: 1}]")
    lora = ["method=lora", "training.optimizer.groups=[{modules: [lora_B], learning_rate: 1e-3}]"]
    assert make_plan(load_recipe(recipe, lora)).recipe.training.optimizer.groups == [
        ParameterGroup(modules=["lora_B"], learning_rate=1e-3)
    ]


def test_labels_are_not_smoothed_beside_the_balancing_loss_of_a_mixture(
    recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = Qwen3MoeConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mixture").mkdir(exist_ok=True)
        (tmp_path / "mixture" / name).write_bytes((tiny_model / name).read_bytes())
    overrides = [f"model={tmp_path / 'mixture'}", "method.target_modules=[q_proj]", "training.label_smoothing=0.1"]
    config.save_pretrained(tmp_path / "mixture")
    assert "found 0.1 with a mixture whose router has a balancing loss" in refusal(recipe, *overrides)
    config.router_aux_loss_coef = 0.0
    config.save_pretrained(tmp_path / "mixture")
    make_plan(load_recipe(recipe, overrides))


def test_the_plan_names_what_is_not_the_default(recipe: Path, diablo: Any) -> None:
    _, plain, _ = diablo("train", recipe, "training.schedule=linear", "--dry-run")
    assert "optimizer" not in plain
    assert "schedule" not in plain
    overrides = [
        "training.optimizer={name: adamw_8bit, betas: [0.9, 0.95], groups: [{modules: [mlp], learning_rate: 1e-5}]}",
        "training.schedule=cosine",
        "training.min_learning_rate=1e-4",
        "training.ema=0.9",
    ]
    status, said, _ = diablo("train", recipe, *overrides, "--dry-run")
    assert status == 0
    assert "optimizer           adamw_8bit; betas [0.9, 0.95]; mlp with learning rate 1e-05" in said
    assert "schedule            cosine; down to 0.0001" in said
    assert "the average of the steps' parameters, with a decay of 0.9" in said


def test_noise_on_the_embeddings_is_there_in_training_alone(recipe: Path, tmp_path: Path) -> None:
    held_out = [f"data.eval={tmp_path / 'rows.jsonl'}", "training.logging_steps=1"]
    plain = train(load_recipe(recipe, held_out)).record["training"]
    noisy = train(load_recipe(recipe, [*held_out, "training.neftune_noise_alpha=20"])).record["training"]
    assert plain["held_out_loss"][0] == noisy["held_out_loss"][0]
    assert not math.isclose(plain["loss"][0][1], noisy["loss"][0][1], abs_tol=1e-5)


def test_smoothed_labels_are_trained_on_and_not_measured_on(recipe: Path, tmp_path: Path) -> None:
    held_out = [f"data.eval={tmp_path / 'rows.jsonl'}", "training.logging_steps=1", "training.batch_size=8"]
    plain = train(load_recipe(recipe, held_out)).record["training"]
    smoothed = train(load_recipe(recipe, [*held_out, "training.label_smoothing=0.5"])).record["training"]
    # Nothing has been learned in the first step, whose rows are all of those that are held out.
    assert plain["loss"][0][1] == pytest.approx(plain["held_out_loss"][0][1], abs=1e-5)
    assert smoothed["held_out_loss"][0] == plain["held_out_loss"][0]
    assert abs(smoothed["loss"][0][1] - plain["loss"][0][1]) > 1e-4
