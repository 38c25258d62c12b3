"""What to do when training goes wrong: a loss that is not finite, no memory left, or somebody who wants to stop."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from diablo.devices import is_out_of_memory
from diablo.errors import UserError
from diablo.models.compiling import as_if_not_compiled
from diablo.recipes.recipe import Recipe
from diablo.records.log import LOGGER, say

_MOST_SKIPPED_IN_A_ROW = 10


class FiniteLosses(TrainerCallback):
    """Stops training at a loss that is not finite, or leaves out its step.

    On a CPU, each loss is checked before its backward. On a GPU this would make the host wait in each step. So in mode
    ``"stop"`` the losses are checked together whenever the trainer logs or saves. In mode ``"skip"`` each loss has to
    be checked at once there too.

    Args:
        mode: ``"stop"`` or ``"skip"``.
        can_look: whether one process alone can search the model for values that are not finite. On a sharded model it
            cannot.

    Attributes:
        skipped: numbers of the steps that were left out, including those before a run was resumed.
    """

    def __init__(self, mode: Literal["stop", "skip"], *, can_look: bool = True) -> None:
        self.mode = mode
        self.can_look = can_look
        self.skipped: list[int] = []
        self._unseen: list[tuple[int, list[str], torch.Tensor]] = []
        self._leave_out = False
        # The sum of this step's finite losses so far; the sum of the finite losses of the steps that were left out
        # since the last log; and the number of these steps.
        self._of_step = self._excluded = 0.0
        self._excluded_steps = 0

    def check(
        self, model: Any, loss: torch.Tensor, step: int, rows: list[str], forward: Callable[[], object]
    ) -> torch.Tensor:
        """Check a loss, or remember it to be checked later.

        Args:
            model: the model.
            loss: the loss, a scalar tensor.
            step: number of the optimizer step, from 1.
            rows: numbers of the rows in the batch, with their files where there are several.
            forward: computes the loss again, to find the module where values stop being finite.

        Returns:
            The loss to go on with. Where the step is left out, it is a zero whose gradients are zeros.

        Raises:
            UserError: the loss is not finite, and training has to stop: in mode ``"stop"``, after ten steps in a row
                that were left out, or where a trained parameter is not finite.
        """
        if loss.device.type != "cpu" and self.mode == "stop":
            self._unseen.append((step, rows, loss.detach()))
            return loss
        # Reading the memory of a CPU tensor directly waits for nothing.
        value = float(loss.detach().numpy()) if loss.device.type == "cpu" else loss.item()
        if math.isfinite(value):
            self._of_step += value
            return loss
        last = self.skipped[-_MOST_SKIPPED_IN_A_ROW:]
        if self.mode == "stop":
            raise _error(value, step, rows, _find(model, forward) if self.can_look else "", self.mode)
        if last == list(range(step - _MOST_SKIPPED_IN_A_ROW, step)) or _not_finite(model):
            raise _error(value, step, rows, _find(model, forward), self.mode)
        self._leave_out = True
        return sum((p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros_like(loss))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Remove all gradients where the step is left out: optimizers skip parameters that have no gradient."""
        if self._leave_out:
            self.skipped.append(state.global_step + 1)
            LOGGER.warning("step %d is left out: its loss is not finite", state.global_step + 1)
            self._excluded += self._of_step
            self._excluded_steps += 1
            model.zero_grad(set_to_none=True)
        self._leave_out, self._of_step = False, 0.0

    def mean_loss(self, mean: float, steps: int) -> float | None:
        """The mean loss since the last call, without the steps that were left out.

        Args:
            mean: the mean over all steps since then. A loss that was not finite counts as 0 in it.
            steps: number of these steps.

        Returns:
            The mean; None where all steps were left out.
        """
        excluded, left_out = self._excluded, self._excluded_steps
        self._excluded, self._excluded_steps = 0.0, 0
        if not left_out:
            return mean
        return (mean * steps - excluded) / (steps - left_out) if steps > left_out else None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the losses since the last check, before anything is logged or saved."""
        if self._unseen and (control.should_log or control.should_save or control.should_training_stop):
            unseen, self._unseen = self._unseen, []
            values = torch.stack([loss for _, _, loss in unseen]).tolist()
            for value, (step, rows, _) in zip(values, unseen, strict=True):
                if not math.isfinite(value):
                    raise _error(value, step, rows, _not_finite(model) if self.can_look else "", self.mode)


def first_module_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The name of the first module whose output has NaN or infinite values in a forward; None where there is none.

    A module that contains others is named only where the outputs of all of them are finite.

    Args:
        model: the model.
        forward: runs one forward of the model.
    """
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            tensors = [each for each in outputs if isinstance(each, torch.Tensor) and each.is_floating_point()]
            if not found and any(not bool(torch.isfinite(each).all()) for each in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        # A compiled layer does not call what is registered on the modules inside.
        with torch.no_grad(), as_if_not_compiled():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0].removeprefix("base_model.model.") if found else None


def _find(model: nn.Module, forward: Callable[[], object]) -> str:
    # Weights are checked first. The module with such a weight need not be where training went wrong, but it is what
    # breaks the forward now.
    if fault := _not_finite(model):
        return fault
    module = first_module_not_finite(model, forward)
    if module is None:
        return "every module's output is finite, so that the loss itself overflows"
    return f"the first module whose output is not finite is {module}"


def _not_finite(model: nn.Module) -> str:
    """Which trained parameter is not finite, in words; empty where all of them are finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            return f"{name.removeprefix('base_model.model.')} is no longer finite"
    return ""


def _error(value: float, step: int, rows: list[str], where: str, mode: str) -> UserError:
    listed = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    return UserError(
        f"The loss is {value} at step {step}, on row{'s' * (len(rows) > 1)} {listed}"
        f"{f'; {where}' if where else ''}. Look at these rows, or start anew with a lower training.learning_rate"
        + (", or set training.on_nonfinite=skip to leave such steps out." if mode == "stop" else ".")
    )


class StopWhenAsked(TrainerCallback):
    """Stops training at Ctrl-C, or at a scheduler's SIGTERM, after the current step and with a checkpoint.

    A second signal stops at once. This is for runs of one process: several processes would stop at different steps.

    Args:
        console: where the arrival of the signal is reported.

    Attributes:
        asked: the signal that asked to stop; None where none has arrived.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopWhenAsked:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:
                break  # this is not the main thread: only that one gets signals
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save a checkpoint and stop, where a signal asked for it."""
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)
        say(self.console, f"{self.asked.name}: stopping after this step; once more to stop at once.")


def out_of_memory_advice(error: Exception, recipe: Recipe, longest: int) -> UserError | None:
    """An error that says which settings to lower, where memory ran out; None where an error says something else.

    Args:
        error: the error that was raised.
        recipe: the run's recipe.
        longest: number of tokens of the longest sequence.
    """
    if not is_out_of_memory(error):
        return None
    training, size = recipe.training, recipe.training.batch_size
    advice = []
    if size > 1:
        advice.append("lower training.batch_size and raise training.gradient_accumulation by as much")
    if training.gradient_checkpointing != "full":
        more = "selective" if training.gradient_checkpointing == "none" else "full"
        advice.append(f"set training.gradient_checkpointing={more}")
    advice.append("lower training.max_length")
    if recipe.quantization is None and not recipe.method.needs_plain_weights:
        advice.append("set quantization=nf4")
    noun = "sequence" if training.packing else "row"
    return UserError(
        f"Out of memory in training with {size} {noun}{'s' * (size > 1)} of up to {longest} tokens at a time: "
        f"{', '.join(advice)}."
    )
