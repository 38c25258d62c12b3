"""Losses in the course of a run, and what held-out losses decide: when it ends, and which parameters it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from diablo.data.batching import collate
from diablo.planning.plan import Plan
from diablo.records.progress import TokenMeter
from diablo.scoring.generation import held_out_loss
from diablo.training.averaging import Average
from diablo.training.engines import Engine, Tensors, trained_parameters


@dataclass
class Losses:
    """Loss per supervised token in nats, by step; of general text before and after training."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    general: list[float] = field(default_factory=list)

    def measure_general(self, model: Any, plan: Plan) -> None:
        """Measure the loss of general text, where there is some."""
        if plan.general:
            self.general.append(held_out_loss(model, plan.general, plan.encoder.tokenizer.pad_token_id))

    def measure_held_out(self, model: Any, plan: Plan, step: int) -> None:
        """Measure the loss of held-out rows, where this step's is not known yet."""
        if plan.held_out and not self.knows(step):
            self.held_out.append((step, held_out_loss(model, plan.held_out, plan.encoder.tokenizer.pad_token_id)))

    def knows(self, step: int) -> bool:
        """Whether the held-out loss of a step has been measured."""
        return any(measured == step for measured, _ in self.held_out)

    @property
    def since_best(self) -> int:
        """How many held-out losses of trained parameters came after the lowest; all where none is a number."""
        losses = [loss if math.isfinite(loss) else math.inf for step, loss in self.held_out if step > 0]
        lowest = min(losses, default=math.inf)
        return len(losses) - 1 - losses.index(lowest) if lowest < math.inf else len(losses)

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out loss of trained parameters, the first of several, or None."""
        measured = [(loss, step) for step, loss in self.held_out if step > 0 and math.isfinite(loss)]
        return min(measured)[1] if measured else None


class HeldOutLoss(TrainerCallback):
    """Measures the held-out loss every ``training.eval_steps`` steps, of the average where there is one.

    Args:
        plan: the plan.
        meter: pauses while it is measured.
        losses: where it is written to, and what decides.
        average: what is measured in the parameters' place.
        engine: how the processes hold the model.

    Attributes:
        best: the trained parameters of the best step, whole, on the CPU; empty where they are not asked for.
        report: told of each held-out loss.
    """

    def __init__(self, plan: Plan, meter: TokenMeter, losses: Losses, average: Average, engine: Engine) -> None:
        self.plan, self.meter, self.losses = plan, meter, losses
        self.average, self.engine = average, engine
        self.best: Tensors = {}
        self.report: Callable[[dict[str, float]], None] = lambda logs: None

    @property
    def is_over(self) -> bool:
        """Whether so many losses in a row were not better that training is to end."""
        patience = self.plan.recipe.training.early_stopping_patience
        return patience is not None and self.losses.since_best >= patience

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure it where it is due, and end training where it has not become better for long enough."""
        every = self.plan.recipe.training.eval_steps
        if not (every and state.global_step % every == 0):
            return
        with self.meter.pause(), self.average.in_place(model):
            self._measure(model, state.global_step)
        if self.is_over and not control.should_training_stop:
            control.should_training_stop = True
            # As after the last step: a run that is killed from here on has nothing left to train.
            control.should_save |= args.save_strategy == "steps"

    def settle(self, model: Any, step: int) -> int:
        """Give the model the parameters that are kept, after training.

        Args:
            model: the model.
            step: the step that training has ended with.

        Returns:
            The step whose parameters these are.
        """
        self.average.take_over(model)
        self._measure(model, step)
        best = self.losses.best_step
        if self.best and best is not None and best != step:
            self.engine.load_trained(model, self.best)
            return best
        return step

    def _measure(self, model: Any, step: int) -> None:
        if self.losses.knows(step):
            return
        self.losses.measure_held_out(model, self.plan, step)
        if self.losses.knows(step):
            self.report({"held_out_loss": self.losses.held_out[-1][1]})
        training = self.plan.recipe.training
        if training.depends_on_held_out:
            # On GPUs the processes' losses may differ in the last digits; all must decide alike.
            self.losses.held_out[-1] = broadcast_object_list([self.losses.held_out[-1]])[0]
        if training.keep == "best" and self.losses.best_step == step:
            whole = self.engine.trained(model)
            self.best = whole or {name: values.cpu().clone() for name, values in trained_parameters(model).items()}


class MeteredCollator:
    """Makes batches that know the numbers of their rows, and counts their tokens.

    Args:
        pad_token_id: fills rows up.
        meter: counts the tokens.
    """

    def __init__(self, pad_token_id: int, meter: TokenMeter) -> None:
        self.pad_token_id, self.meter = pad_token_id, meter

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some rows, with ``numbers``, a list, beside the tensors."""
        batch = collate(features, self.pad_token_id)
        self.meter.count(sum(len(row["input_ids"]) for row in features), batch["input_ids"].numel())
        # A list, which stays on the host.
        return {**batch, "numbers": [row["number"] for row in features]}
