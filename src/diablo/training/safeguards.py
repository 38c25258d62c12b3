"""Bad weather: losses that are not finite, memory that runs out, and somebody who wants to stop."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from diablo.errors import UserError

_MOST_SKIPPED_IN_A_ROW = 10


class FiniteLosses(TrainerCallback):
    """Stops training at a loss that is not finite, or leaves out the step.

    On a CPU a loss is looked at before its backward. On a GPU that would make the host wait in each step, so losses are
    looked at together whenever the trainer logs or saves; where steps are to be left out, it has to be done each time.

    Args:
        mode: ``"stop"`` or ``"skip"``.

    Attributes:
        skipped: the steps that were left out.
    """

    def __init__(self, mode: Literal["stop", "skip"]) -> None:
        self.mode = mode
        self.skipped: list[int] = []
        self._unseen: list[tuple[int, list[int], torch.Tensor]] = []
        self._leave_out = False

    def check(
        self, model: Any, loss: torch.Tensor, step: int, rows: list[int], forward: Callable[[], object]
    ) -> torch.Tensor:
        """Look at a loss, or remember it.

        Args:
            model: the model.
            loss: a scalar.
            step: number of the optimizer step, from 1.
            rows: numbers of the rows in the batch.
            forward: computes the loss again, to find where it stops being finite.

        Returns:
            The loss to go on with: one without gradient where the step is to be left out.

        Raises:
            UserError: it is not finite, and training is to stop.
        """
        if loss.device.type != "cpu" and self.mode == "stop":
            self._unseen.append((step, rows, loss.detach()))
            return loss
        # Reading a CPU tensor's memory waits for nothing.
        value = float(loss.detach().numpy()) if loss.device.type == "cpu" else loss.item()
        if math.isfinite(value):
            return loss
        last = self.skipped[-_MOST_SKIPPED_IN_A_ROW:]
        runs_away = last == list(range(step - _MOST_SKIPPED_IN_A_ROW, step)) or _not_finite(model)
        if self.mode == "stop" or runs_away:
            raise _error(value, step, rows, _find(model, forward))
        self._leave_out = True
        return sum((p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros_like(loss))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the gradients away where the step is left out: optimizers pass over parameters without one."""
        if self._leave_out:
            self._leave_out = False
            self.skipped.append(state.global_step + 1)
            model.zero_grad(set_to_none=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the losses since the last time, before anything is logged or saved."""
        if self._unseen and (control.should_log or control.should_save or control.should_training_stop):
            unseen, self._unseen = self._unseen, []
            values = torch.stack([loss for _, _, loss in unseen]).tolist()
            for value, (step, rows, _) in zip(values, unseen, strict=True):
                if not math.isfinite(value):
                    raise _error(value, step, rows, _not_finite(model))


def first_module_not_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first module whose output has NaN or infinite values in a forward; None where none has.

    A module that holds others is found only where none of these is at fault.
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
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0].removeprefix("base_model.model.") if found else None


def _find(model: nn.Module, forward: Callable[[], object]) -> str:
    # Weights first: the first module with such a weight need not be the one where training went wrong, but it is at
    # fault now.
    if fault := _not_finite(model):
        return fault
    module = first_module_not_finite(model, forward)
    if module is None:
        return "every module's output is finite, so that the loss itself overflows"
    return f"the first module whose output is not finite is {module}"


def _not_finite(model: nn.Module) -> str:
    """Which trained parameter is not finite, in words; empty where all are."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            return f"{name.removeprefix('base_model.model.')} is no longer finite"
    return ""


def _error(value: float, step: int, rows: list[int], where: str) -> UserError:
    listed = ", ".join(map(str, rows[:16])) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    return UserError(
        f"The loss is {value} at step {step}, on row{'s' * (len(rows) > 1)} {listed}"
        f"{f'; {where}' if where else ''}. Lower training.learning_rate, look at these rows, or set "
        "training.on_nonfinite=skip to leave such steps out."
    )


class StopWhenAsked(TrainerCallback):
    """Ctrl-C, or a scheduler's SIGTERM: the step that is being made is finished, a checkpoint saved, and training ends.

    A second Ctrl-C ends at once. With several processes nothing is caught: they would stop at different steps.

    Attributes:
        asked: the signal that asked; None where nobody has.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopWhenAsked:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:
                break  # not in the main thread, where no signals arrive
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop where asked to."""
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number)


def out_of_memory_advice(error: Exception, batch_size: int, longest: int, *, checkpointing: bool) -> UserError | None:
    """What to lower where memory ran out; None where an error says something else.

    Args:
        error: the error.
        batch_size: rows of a forward.
        longest: tokens of the longest row.
        checkpointing: whether gradient checkpointing is on.
    """
    is_out = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if not is_out:
        return None
    more = "" if checkpointing else ", set training.gradient_checkpointing=true"
    return UserError(
        f"Out of memory in a step with {batch_size} row{'s' * (batch_size > 1)} of up to {longest} tokens at a time: "
        f"lower training.batch_size and raise training.gradient_accumulation by as much{more}, lower "
        "training.max_length, or set quantization=nf4."
    )
