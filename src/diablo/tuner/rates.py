"""The learning rate that suits blocks, and a warning where an optimizer's rate is far below it."""

from __future__ import annotations

import statistics
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diablo.tuner.layers import DiabloEmbedding, DiabloLayer

OUTPUT_STEP = 0.1
"""How far a step of Adam may move an output of a block at the highest rate, where all inputs have size one and agree in
sign: the rate times the rows of the block. Measured: ``docs/experiments/learning-rate.md``."""
FAR_BELOW = 0.25
"""The share of the suggested rate below which a rate is warned of."""


class LowLearningRateWarning(UserWarning):
    """An optimizer has a learning rate that suits LoRA's factors, and is far below what suits blocks."""


def learning_rate_for(rows: Iterable[int]) -> float:
    """The learning rate to start from: 0.1 over the rows of a block, to two digits.

    A step of Adam moves every entry by about the rate, and an output by the sum over the rows of its block, which are
    the layer's inputs divided by N. So the rate that suits goes as one over the rows, whatever N, the width and the
    kind of layer.

    Args:
        rows: the rows of the blocks of each layer. The median counts.
    """
    return float(f"{OUTPUT_STEP / statistics.median(rows):.1e}")


def suggested_learning_rate(model: nn.Module, adapter_name: str = "default") -> float:
    """The learning rate of Adam, AdamW, Lion or Adafactor to start from, for the adapter of a model.

    It is to be the highest rate of the schedule: ``TrainingArguments(learning_rate=...)`` takes it as it is.

    Args:
        model: has the adapter, as ``get_peft_model`` makes it.
        adapter_name: its name.

    Raises:
        ValueError: the model has no blocks of this adapter in a layer that adds up its inputs. Embeddings add up none.

    Example::

        model = get_peft_model(model, diablo.DiabloConfig(num_blocks=64))
        arguments = TrainingArguments("out", learning_rate=diablo.suggested_learning_rate(model))
    """
    rows = _rows_of(model, adapter_name)
    if not rows:
        raise ValueError(
            f"The model has no adapter {adapter_name!r} of DiaBlo on a layer that adds up its inputs; give the name of "
            "one that it has, or choose a rate by trying several."
        )
    return learning_rate_for(rows)


def watch_learning_rate(model: nn.Module) -> None:
    """Look at the first step of the optimizer that trains a model's blocks, and warn once if its rate is far too low.

    A rate that was chosen for LoRA trains blocks too, only several times more slowly, and nothing else would show it.

    Args:
        model: has adapted layers. Nothing here keeps it alive.
    """
    known = weakref.ref(model)
    seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = known()
        if own is None:
            handle.remove()
        elif not torch.compiler.is_compiling() and optimizer not in seen:
            seen.add(optimizer)
            if _looked_at(own, optimizer):
                handle.remove()

    handle = register_optimizer_step_pre_hook(look)
    weakref.finalize(model, handle.remove)


def _rows_of(model: nn.Module, adapter_name: str) -> list[int]:
    """The rows of an adapter's blocks, for each weight whose outputs are sums over its inputs."""
    layers = [module for module in model.modules() if isinstance(module, DiabloLayer)]
    adding = [layer for layer in layers if not isinstance(layer, DiabloEmbedding)]
    return [layout.blocks_shape[-2] for layer in adding for layout in layer.layouts_of(adapter_name).values()]


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
    rows = _rows_of(model, found[0][1])
    if rows and any(word in type(optimizer).__name__ for word in ("Adam", "Lion", "Adafactor")):
        # A scheduler has set the rate of the first step, which warm-up makes small, and noted the highest one.
        highest = max(float(group.get("initial_lr") or group.get("lr") or 0) for group, _ in found)
        suggested = learning_rate_for(rows)
        if 0 < highest < FAR_BELOW * suggested:
            warnings.warn(
                f"The learning rate is {highest:g}, which suits LoRA. DiaBlo's blocks learn more slowly with it than "
                f"they could: start from {suggested:g}, which diablo.suggested_learning_rate(model) gives.",
                LowLearningRateWarning,
                stacklevel=2,
            )
    return True
