"""Measurements in the course of a run, and what they decide: when it ends, and which parameters it keeps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import TrainerCallback

from diablo.data.batching import collate, collate_rows
from diablo.data.packing import flatten
from diablo.models.compiling import as_if_not_compiled
from diablo.planning.plan import Plan
from diablo.records.progress import TokenMeter
from diablo.scoring.generation import held_out_loss
from diablo.scoring.several_tasks import score_tasks
from diablo.training.averaging import Average
from diablo.training.engines import Engine, Tensors, trained_parameters


@dataclass
class Losses:
    """Losses by step; of general text before and after training. Those of completions are per token, in nats.

    Attributes:
        train: of training rows.
        held_out: of held-out rows.
        figures: what else is measured on held-out rows, by step, by its name.
        scores: the score on validation problems, by step, where that says which step is best: the mean over the tasks
            of their headline figures, from 0 to 1; or the score of an objective that has one on held-out rows.
        general: of general text.
        rewards: mean rewards of completions that were trained on.
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    figures: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    scores: list[tuple[int, float]] = field(default_factory=list)
    general: list[float] = field(default_factory=list)
    rewards: list[tuple[int, float]] = field(default_factory=list)

    @property
    def measured(self) -> list[tuple[int, float]]:
        """What was measured on held-out rows, by step, the lower the better: their loss, or minus their reward."""
        return self.held_out or [(step, -reward) for step, reward in self.figures.get("reward", [])]

    def measure_general(self, model: Any, plan: Plan) -> None:
        """Measure the loss of general text, where there is some."""
        if plan.general:
            self.general.append(held_out_loss(model, plan.general, plan.encoder.tokenizer.pad_token_id))

    def take_held_out(self, step: int, figures: Mapping[str, float]) -> None:
        """Take what was measured on held-out rows: their ``loss``, and other figures by their names."""
        for name, value in figures.items():
            of_name = self.held_out if name == "loss" else self.figures.setdefault(name, [])
            of_name.append((step, value))

    def measure_score(self, model: Any, plan: Plan, step: int) -> None:
        """Measure the score on validation problems, where it says which step is best."""
        if plan.validated:
            # Generation has a cache, which grows: its graphs would take minutes, and as many as one layer may have.
            with as_if_not_compiled():
                scores = score_tasks(
                    model,
                    plan.encoder,
                    plan.validated,
                    console=Console(quiet=True),
                    batch_size=plan.recipe.evaluation.batch_size,
                    problems=plan.validation_problems,
                )
            self.scores.append((step, statistics.fmean(score.headline for score in scores.values())))

    def knows(self, step: int) -> bool:
        """Whether a step has been measured."""
        return any(measured == step for measured, _ in self.measured)

    @property
    def since_best(self) -> int:
        """How many measurements of trained parameters came after the best one; all where no loss is a number."""
        steps = [step for step, _ in self.measured if step > 0]
        return len(steps) if self.best_step is None else len(steps) - 1 - steps.index(self.best_step)

    @property
    def best_step(self) -> int | None:
        """The step of the best trained parameters, or None where no loss is a number.

        It is that of the highest score where there are scores, then of the lowest held-out loss, then the first one.
        """
        scores = dict(self.scores)
        measured = [
            (-scores.get(step, 0.0), loss, step) for step, loss in self.measured if step > 0 and math.isfinite(loss)
        ]
        return min(measured)[2] if measured else None


class HeldOutLoss(TrainerCallback):
    """Measures the held-out loss, and a score where it is asked for, every ``training.eval_steps`` steps.

    Where there is an average of the parameters, it is measured in their place.

    Args:
        plan: the plan.
        meter: pauses while it is measured.
        losses: where it is written to, and what decides.
        average: what is measured in the parameters' place.
        engine: how the processes hold the model.

    Attributes:
        best: the trained parameters of the best step, whole, on the CPU; empty where they are not asked for.
        report: told of each measurement.
        figures: measures the model on the held-out rows.
    """

    def __init__(self, plan: Plan, meter: TokenMeter, losses: Losses, average: Average, engine: Engine) -> None:
        self.plan, self.meter, self.losses = plan, meter, losses
        self.average, self.engine = average, engine
        self.best: Tensors = {}
        self.report: Callable[[dict[str, float]], None] = lambda logs: None
        self.figures: Callable[[], Mapping[str, float]] = dict

    @property
    def is_over(self) -> bool:
        """Whether so many measurements in a row were not better that training is to end."""
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

    def measure_start(self) -> None:
        """Measure the model as it is before training."""
        if self.plan.held_out and not self.losses.knows(0):
            self.losses.take_held_out(0, self.figures())

    def settle(self, model: Any, step: int) -> int:
        """Give the model the parameters that are kept, after training.

        Args:
            model: the model.
            step: the step that training has ended with.

        Returns:
            The step whose parameters these are.
        """
        self.average.take_over(model)
        with self.meter.pause():
            self._measure(model, step)
        best = self.losses.best_step
        if self.best and best is not None and best != step:
            self.engine.load_trained(model, self.best)
            return best
        return step

    def _measure(self, model: Any, step: int) -> None:
        losses, training = self.losses, self.plan.recipe.training
        if losses.knows(step):
            return
        if self.plan.held_out:
            losses.take_held_out(step, self.figures())
        if training.best_by == "score":
            measured = [name for name in self.plan.recipe.objective.scores if name in losses.figures]
            losses.scores += [(step, losses.figures[name][-1][1]) for name in measured]
        losses.measure_score(model, self.plan, step)
        if losses.knows(step):
            others = {f"held_out_{name}": values[-1][1] for name, values in losses.figures.items()}
            score = {"validation_score": losses.scores[-1][1]} if self.plan.validated else {}
            loss = {"held_out_loss": losses.held_out[-1][1]} if losses.held_out else {}
            self.report({**loss, **others, **score})
        if training.depends_on_held_out:
            # On GPUs the processes' figures may differ in the last digits; all must decide alike.
            deciding = [losses.held_out, losses.figures.get("reward", []), losses.scores]
            for values, last in zip(deciding, broadcast_object_list([each[-1:] for each in deciding]), strict=True):
                values[-1:] = last
        if training.keep == "best" and self.losses.best_step == step:
            whole = self.engine.trained(model)
            self.best = whole or {name: values.cpu().clone() for name, values in trained_parameters(model).items()}


class MeteredCollator:
    """Makes batches that know the numbers of their rows, and counts their tokens.

    Args:
        plan: has the rows, whose pixels are read here.
        meter: counts the tokens.
    """

    def __init__(self, plan: Plan, meter: TokenMeter) -> None:
        self.plan, self.meter = plan, meter

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some sequences, with the ``numbers`` of their rows, a list, beside the tensors."""
        pad_token_id, images = self.plan.encoder.tokenizer.pad_token_id, self.plan.encoder.images
        if images is None:
            # Attention that needs no padding takes packed rows one behind the other.
            batch = collate([flatten(features)] if self.plan.is_flat else features, pad_token_id)
        else:
            rows = [row for sequence in features for row in self.plan.rows_of(sequence["sequence"])]
            batch = collate_rows(rows, pad_token_id, images)
        tokens = sum(len(sequence["input_ids"]) + len(sequence.get("written", ())) for sequence in features)
        # The labels of an encoder-decoder are those of other tokens, which its decoder writes.
        padded = batch["input_ids"].numel() + (batch["labels"].numel() if "written" in features[0] else 0)
        self.meter.count(tokens, padded)
        # A list, which stays on the host.
        return {**batch, "numbers": [number for sequence in features for number in sequence["numbers"]]}
