"""What is told of a run while it trains: a line in ``train.jsonl`` for each logged step, and the settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from diablo.records.log import LOGGER
from diablo.records.progress import TokenMeter
from diablo.training.measuring import Losses

LOG = "train.jsonl"
HELD_OUT = ("held_out_loss", "held_out_reward")
"""The keys of a log of what was measured on held-out rows."""

KINDS = ("loss", *HELD_OUT)
"""The keys of a log that make it a line."""


class Tracked(TrainingArguments):
    """Arguments of a trainer, with the recipe beside them; a class beside it is TRL's own of the trainer.

    A tracker of transformers records what ``to_dict`` gives as the run's configuration.

    Attributes:
        recipe: the recipe's settings.
    """

    recipe: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The arguments, and the recipe's settings under ``recipe.section.key``."""
        return super().to_dict() | dict(_flat(self.recipe, "recipe"))


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}.{name}")
        elif isinstance(value, (list, dict)):
            yield f"{prefix}.{name}", json.dumps(value)
        else:
            yield f"{prefix}.{name}", value


class TrainLog(TrainerCallback):
    """Writes every logged step to ``train.jsonl``: step, epoch, loss, learning rate, gradient norm, tokens and seconds.

    Args:
        folder: the run's folder.
        meter: counts tokens and seconds.
        losses: have the held-out loss from before training.

    Attributes:
        told: the last step that was logged before the run went on, for each kind of loss. It may lie behind the
            checkpoint.
    """

    def __init__(self, folder: Path, meter: TokenMeter, losses: Losses) -> None:
        self.path, self.meter, self.losses = folder / LOG, meter, losses
        self.told: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the file, or go on with it."""
        if state.is_world_process_zero:
            self.go_on_from(state.global_step)

    def go_on_from(self, step: int) -> None:
        """Keep the lines of a step and of those before it, and drop the others; none is kept of another run."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        start = {f"held_out_{name}": values[0][1] for name, values in self.losses.figures.items()}
        if self.losses.held_out:
            start = {"held_out_loss": self.losses.held_out[0][1], **start}
        before = [json.dumps({"step": 0, **start})] if start else []
        steps = {line: step_of for line in lines if math.isfinite(step_of := _step_of(line))} if step else {}
        self.told = {kind: max((s for line, s in steps.items() if f'"{kind}"' in line), default=0) for kind in KINDS}
        kept = [line for line in lines if _step_of(line) <= step] if step else before
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line."""
        if state.is_world_process_zero and logs and any(kind in logs for kind in KINDS):
            line = {"step": state.global_step, **logs, "tokens": self.meter.tokens, "seconds": self.meter.seconds()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            figures = [f"{kind.replace('held_out_', 'held-out ')} {logs[kind]:.4f}" for kind in KINDS if kind in logs]
            if "validation_score" in logs:
                figures.append(f"validation score {logs['validation_score']:.1%}")
            if "reward" in logs:
                figures.insert(0, f"reward {logs['reward']:.4f}")
            if logs.get("frac_reward_zero_std") == 1:
                LOGGER.warning(
                    "step %d: of each prompt, all completions had the same reward, so that nothing was learned",
                    state.global_step,
                )
            if "loss" in logs:
                figures.append(f"learning rate {logs['learning_rate']:.3g}")
                figures.append(f"{self.meter.tokens_per_second():.0f} tokens/s")
            LOGGER.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(figures))


class LastLoss(TrainerCallback):
    """Has the last step's loss logged too, which ``training.logging_steps`` may pass over."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for it."""
        control.should_log = control.should_log or state.global_step >= state.max_steps


def _step_of(line: str) -> float:
    # A line that a kill has cut is of no step.
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
