"""A plain training loop on real data, in which everything an experiment wants to see can be seen.

Runs of users go through ``diablo train``; this is a dozen lines of PyTorch over the same rows, batches and loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from diablo.data.batching import collate
from diablo.models.loading import load_model
from diablo.planning.making import make_plan
from diablo.planning.plan import Plan
from diablo.recipes.applying import apply_method
from diablo.recipes.methods import AnyMethod
from diablo.recipes.recipe import Recipe
from diablo.scoring.generation import held_out_loss
from diablo.scoring.losses import summed_completion_loss
from diablo.training.averaging import Average
from diablo.training.safeguards import FiniteLosses

MAX_GRAD_NORM = 1.0


def plan_data(
    model: str,
    rows: int,
    held_out: int,
    batch_size: int,
    num_blocks: int,
    seed: int,
    task: str = "mawps",
    folder: str = "",
) -> Plan:
    """Problems for training and, of the test split, for the held-out loss.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        rows: training rows.
        held_out: test rows.
        batch_size: rows of a step.
        num_blocks: N of the method that the plan is made for.
        seed: seed of the order of the rows.
        task: the task; word problems of MAWPS where nothing is said.
        folder: where the data of the task is, where it is not in the package.
    """
    data = {"limit": rows, "held_out": "test"} | ({"folder": folder} if folder else {})
    return make_plan(
        Recipe.model_validate(
            {
                "model": model,
                "task": task,
                "data": data,
                "method": {"name": "diablo", "num_blocks": num_blocks},
                "training": {"batch_size": batch_size},
                "evaluation": {"limit": held_out},
                "attention": "eager",
                "output": "unused",
                "seed": seed,
            }
        )
    )


def load_adapted(
    plan: Plan,
    method: AnyMethod,
    dtype: torch.dtype | None = None,
    change: Callable[[nn.Module], None] | None = None,
) -> Any:
    """A fresh model with a method applied, on its device.

    Args:
        plan: whose model it is.
        method: the method.
        dtype: dtype of the frozen weights; the plan's where None.
        change: changes the model before the method is applied.
    """
    model = load_model(plan.model_name, dtype or plan.dtype, plan.recipe.attention).to(plan.device)
    if change is not None:
        change(model)
    return apply_method(model, method)


def batch_of(plan: Plan, indices: list[int]) -> dict[str, torch.Tensor]:
    """Training rows as a batch on the device."""
    batch = collate([plan.features_of(index) for index in indices], plan.encoder.tokenizer.pad_token_id)
    return {name: values.to(plan.device) for name, values in batch.items()}


def completion_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss of the supervised tokens, in nats; in bf16 where the model's embeddings are."""
    dtype = model.get_input_embeddings().weight.dtype
    lowered = torch.autocast(batch["labels"].device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
    with lowered:
        return summed_completion_loss(model, batch) / len(batch["predicting"])


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without decay."""
    return torch.optim.AdamW(groups, weight_decay=0.0)


@dataclass
class Trajectory:
    """What a run of training was like.

    Attributes:
        losses: training loss of each step.
        gradient_norms: norm of the trained parameters' gradient at each step, before it is clipped.
        watched: what was watched at each step.
        held_out_loss: loss per token on the held-out rows after the last step.
        seconds: training, without the measurements.
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    watched: list[dict[str, float]] = field(default_factory=list)
    held_out_loss: float = float("nan")
    seconds: float = 0.0


def finetune(
    model: Any,
    plan: Plan,
    rate: float | list[dict[str, Any]],
    *,
    warmup: int = 4,
    watch: Callable[[Any], dict[str, float]] | None = None,
    optimizer_of: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = adamw,
    average: float | None = None,
) -> Trajectory:
    """Train one epoch, with a linear schedule and clipped gradients, as ``diablo train`` does.

    Args:
        model: an adapted model.
        plan: the data.
        rate: learning rate; or the groups of parameters of the optimizer, each with its ``lr``.
        warmup: steps of warm-up.
        watch: called with the model after each backward.
        optimizer_of: makes the optimizer of groups of parameters; AdamW without decay where nothing is said.
        average: decay of an exponential moving average of the parameters, which is then what is measured.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = plan.sampler.batches()
    groups = rate if isinstance(rate, list) else [{"params": parameters, "lr": rate}]
    optimizer = optimizer_of(groups)
    averaged = Average(average, FiniteLosses("stop"))
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    found = Trajectory()
    model.train()
    for indices in batches:
        start = time.perf_counter()
        loss = completion_loss(model, batch_of(plan, indices))
        loss.backward()
        found.seconds += time.perf_counter() - start
        if watch is not None:
            found.watched.append(watch(model))
        start = time.perf_counter()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        averaged.take_in(model)
        found.losses.append(loss.item())
        found.gradient_norms.append(norm.item())
        found.seconds += time.perf_counter() - start
    averaged.take_over(model)
    found.held_out_loss = held_out_loss(model, plan.held_out, plan.encoder.tokenizer.pad_token_id)
    return found
