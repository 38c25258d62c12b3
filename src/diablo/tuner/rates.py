"""The learning rate that suits blocks, and a warning where an optimizer's rate is far below it."""

from __future__ import annotations

import statistics
import warnings
import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from diablo.tuner.layers import DiabloConv, DiabloEmbedding, DiabloLayer, DiabloQuantizedLinear
from diablo.tuner.weights import is_distributed, recomputed

RELATIVE_STEP = 0.035
"""How much a step of Adam may change an output of a layer at the highest rate of a long run, as a share of the output's
size. Measured, as the next two: ``docs/experiments/learning-rate.md``."""
HALF_STEPS = 50
"""Steps of a run for which half of that is right."""
FEWEST_STEPS = 24
"""Steps of the shortest run that was measured. What is right for a shorter one is not known."""
FAR_BELOW = 0.1
"""The share of a long run's suggested rate below which a rate is warned of."""
SAMPLED_ROWS = 64
"""Rows of a weight whose length is measured. They stand for all of its rows."""
STEPS_BY_THE_RATE = ("Adam", "Lion", "Adafactor")
"""Parts of the names of optimizers that move every entry by about the rate."""

# Hooks of models that are gone. An optimizer may be going through all hooks when a model goes, so that they are removed
# when the next model comes.
_FINISHED: list[RemovableHandle] = []
_IS_WATCHED = ContextVar("is_watched", default=True)


class LowLearningRateWarning(UserWarning):
    """An optimizer has a learning rate that suits LoRA's factors, and is far below what suits blocks."""


def gain_of(matrix: torch.Tensor) -> float:
    """How strongly a layer answers to inputs of size one: the mean length of the rows of its weight.

    Args:
        matrix: the weight, as ``(*stack, out_features, in_features)``. Of each matrix 64 rows are read.
    """
    step = max(1, matrix.shape[-2] // SAMPLED_ROWS)
    return matrix[..., ::step, :].detach().float().norm(dim=-1).mean().item()


def learning_rate_for(layers: Iterable[tuple[int, float]], steps: int | None = None) -> float:
    """The highest learning rate of a schedule to start from, for an optimizer of Adam's kind, to two digits.

    A step moves every entry of a block by about the rate. So an output, which is a sum over the rows of the block,
    moves by up to rate x rows, for inputs of size one. The layer's own output has the size of its gain. The rate is
    such that a step of a long run changes outputs by 3.5 % of themselves. In a short run less is better:
    0.035 x gain / rows x steps / (steps + 50).

    Args:
        layers: for each adapted weight the rows of a block, and its gain, as :func:`gain_of` measures it. The median
            of what suits them is taken.
        steps: optimizer steps of the run, of which fewer than 24 count as 24. None is for a long run.
    """
    share = 1.0 if steps is None else 1 / (1 + HALF_STEPS / max(steps, FEWEST_STEPS))
    return float(f"{share * statistics.median(RELATIVE_STEP * gain / rows for rows, gain in layers):.1e}")


def suggested_learning_rate(model: nn.Module, adapter_name: str = "default", *, steps: int | None = None) -> float:
    """The learning rate to start from, for an adapter of a model and Adam, AdamW, Lion or Adafactor.

    It is to be the highest rate of the schedule: ``TrainingArguments(learning_rate=...)`` takes it as it is. It comes
    from the number of rows of the blocks, from the weights, and from the length of the run.

    Args:
        model: has the adapter, as ``get_peft_model`` makes it. Its weights are in memory, and not sharded.
        adapter_name: the adapter's name.
        steps: optimizer steps of the run. A run of 200 steps wants four fifths of the rate of a long one, and a run of
            50 steps half of it. Where nothing is said, the rate is that of a long run.

    Raises:
        ValueError: the adapter has no blocks on a linear layer, or their weights are out of reach.

    Example::

        model = get_peft_model(model, diablo.DiabloConfig(num_blocks=64))
        arguments = TrainingArguments("out", learning_rate=diablo.suggested_learning_rate(model))
    """
    if not (layers := _measured(model, adapter_name)):
        raise ValueError(
            f"The model has no blocks of an adapter {adapter_name!r} on linear layers whose weights are in memory and "
            "whole; ask before the model is sharded, with the name of an adapter of DiaBlo, or choose a rate by trying "
            "several."
        )
    return learning_rate_for(layers, steps)


def watch_learning_rate(model: nn.Module) -> None:
    """Look at the first step of the optimizer that trains a model's blocks, and warn once if its rate is far too low.

    A rate that was chosen for LoRA trains blocks too, only several times more slowly, and nothing else would show it.

    Args:
        model: has adapted layers. Nothing here keeps it alive.
    """
    if not _IS_WATCHED.get():
        return
    while _FINISHED:
        _FINISHED.pop().remove()
    known = weakref.ref(model)
    seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
    is_done = False

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal is_done
        own = known()
        if own is not None and not is_done and not torch.compiler.is_compiling() and optimizer not in seen:
            seen.add(optimizer)
            is_done = _looked_at(own, optimizer)

    handle = register_optimizer_step_pre_hook(look)
    weakref.finalize(model, _FINISHED.append, handle)


@contextmanager
def not_watched() -> Generator[None]:
    """No warning of the learning rate for adapters that are added meanwhile: whoever trains them looks by himself."""
    token = _IS_WATCHED.set(False)
    try:
        yield
    finally:
        _IS_WATCHED.reset(token)


def _measured(model: nn.Module, adapter_name: str) -> list[tuple[int, float]]:
    """Rows of a block and gain of each weight that an adapter changes, where they are in reach.

    Convolutions and embeddings are left out: the one adds up its inputs over a kernel too, and the other none.
    """
    found = []
    for layer in model.modules():
        if not isinstance(layer, DiabloLayer) or isinstance(layer, DiabloConv | DiabloEmbedding):
            continue
        for name, layout in layer.layouts_of(adapter_name).items():
            gain = (
                _answered_gain(layer, model) if isinstance(layer, DiabloQuantizedLinear) else _stored_gain(layer, name)
            )
            if gain is not None:
                found.append((layout.blocks_shape[-2], gain))
    return found


def _stored_gain(layer: DiabloLayer, name: str) -> float | None:
    """The gain of a weight; None where it is computed anew in each forward, sharded or not in memory."""
    base_layer = layer.get_base_layer()
    weight = base_layer._parameters.get(name)
    if weight is None or recomputed(base_layer, name) is not None or is_distributed(weight) or weight.is_meta:
        return None
    return gain_of(layer.weights[name].matrix(weight))


@torch.no_grad()
def _answered_gain(layer: DiabloQuantizedLinear, model: nn.Module) -> float:
    """The gain of a quantized layer, by its outputs for random inputs: not every library gives its weights back."""
    base_layer = layer.get_base_layer()
    plain = next(each for each in model.parameters() if each.is_floating_point() and not each.requires_grad)
    drawn = torch.randn(SAMPLED_ROWS, layer.weights["weight"].in_features, generator=torch.Generator().manual_seed(0))
    # The last row's answer is the bias.
    inputs = torch.cat([drawn, torch.zeros_like(drawn[:1])]).to(plain.device, plain.dtype)
    answers = base_layer(inputs).float()
    return (answers[:-1] - answers[-1]).square().mean().sqrt().item()


def _looked_at(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Warn if need be; whether the optimizer trains blocks of the model."""
    of_blocks = {
        id(blocks): name
        for layer in model.modules()
        if isinstance(layer, DiabloLayer)
        for name in layer.diablo_layout
        for blocks in layer.blocks_of(name).values()
    }
    members = [(group, id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    found = [(group, of_blocks[member]) for group, member in members if member in of_blocks]
    if not found:
        return False
    layers = _measured(model, found[0][1])
    if layers and any(word in type(optimizer).__name__ for word in STEPS_BY_THE_RATE):
        # A scheduler has set the rate of the first step, which warm-up makes small, and noted the highest one.
        highest = max(float(group.get("initial_lr") or group.get("lr") or 0) for group, _ in found)
        # How many steps there will be is not known here.
        suggested = learning_rate_for(layers)
        if 0 < highest < FAR_BELOW * suggested:
            warnings.warn(
                f"The learning rate is {highest:g}, which suits LoRA. DiaBlo's blocks learn more slowly with it than "
                f"they could: start from {suggested:g}, which diablo.suggested_learning_rate(model) gives, or from a "
                "tenth of it where training is by preferences or rewards.",
                LowLearningRateWarning,
                stacklevel=2,
            )
    return True
