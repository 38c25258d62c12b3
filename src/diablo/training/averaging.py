"""An exponential moving average of the trained parameters, which is measured and saved in their place."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback

from diablo.training.engines import Tensors, trained_parameters
from diablo.training.safeguards import FiniteLosses


class Average(TrainerCallback):
    """Averages the trained parameters after every step.

    The parameters of a step weigh ``decay`` times as much as those of the step after it. The weights sum to 1 from the
    first step on, so that where training starts has no part in the average.

    Args:
        decay: above 0 and below 1; None where nothing is averaged.
        finite: knows the steps that were left out, which do not count.

    Attributes:
        steps: how many steps have been averaged.
        values: the average by the names of the parameters, each like its parameter; empty before the first step.
    """

    def __init__(self, decay: float | None, finite: FiniteLosses) -> None:
        self.decay = decay
        self.finite = finite
        self.steps = 0
        self.values: Tensors = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the parameters into the average, unless the step was left out."""
        if self.finite.skipped[-1:] != [state.global_step]:
            self.take_in(model)

    @torch.no_grad()
    def take_in(self, model: Any) -> None:
        """Take the parameters of a model into the average."""
        if self.decay is None:
            return
        trained = trained_parameters(model)
        if not self.values:
            self.values = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        self.steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.steps)
        get_ema_multi_avg_fn(1 - share)([self.values[name] for name in trained], list(trained.values()), self.steps)

    @contextmanager
    def in_place(self, model: Any) -> Generator[None]:
        """Have the model compute with the average, where there is one, and afterwards with its parameters again."""
        with with_values(model, self.values):
            yield

    def take_over(self, model: Any) -> None:
        """Give the parameters the values of the average, where there is one."""
        _write(self._averaged(model), self.values)

    def _averaged(self, model: Any) -> Tensors:
        return trained_parameters(model) if self.values else {}


@contextmanager
def with_values(model: Any, values: Tensors) -> Generator[None]:
    """Have the model compute with other values of its trained parameters, and afterwards with its own again.

    Args:
        model: the model.
        values: a tensor for each trained parameter, by its name; none where nothing is to change.
    """
    trained = trained_parameters(model) if values else {}
    kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
    _write(trained, values)
    try:
        yield
    finally:
        _write(trained, kept)


@torch.no_grad()
def _write(parameters: Tensors, values: Tensors) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
