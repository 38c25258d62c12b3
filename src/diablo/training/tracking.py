"""What is told of a run while it trains: a line in ``train.jsonl`` for each logged step, and what trackers are told."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from trl import SFTConfig

from diablo.planning.plan import Plan
from diablo.records.progress import TokenMeter
from diablo.training.measuring import Losses

LOG = "train.jsonl"


@dataclass
class TrackedConfig(SFTConfig):
    """The trainer's arguments, with the recipe beside them.

    A tracker of transformers records what ``to_dict`` gives as the run's configuration.
    """

    recipe: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The arguments, and the recipe's settings under ``recipe.section.key``."""
        told = super().to_dict()
        return told | dict(_flat(told.pop("recipe"), "recipe"))


def _flat(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}.{name}")
        elif isinstance(value, (list, dict)):
            yield f"{prefix}.{name}", json.dumps(value)
        else:
            yield f"{prefix}.{name}", value


@contextmanager
def environment_of(plan: Plan) -> Iterator[None]:
    """The environment variables by which trackers are told where to write, while a run trains.

    What the user has set in the environment stays as it is.
    """
    tracking, output = plan.recipe.tracking, plan.recipe.output
    wanted = {"TENSORBOARD_LOGGING_DIR": str(output / "tensorboard")}
    if tracking.project is not None:
        wanted |= dict.fromkeys(("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "COMET_PROJECT_NAME"), tracking.project)
    if tracking.tags:
        wanted["WANDB_TAGS"] = ",".join(tracking.tags)
        wanted["MLFLOW_TAGS"] = json.dumps(dict.fromkeys(tracking.tags, "true"))
    given = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            os.environ.pop(name, None)


class TrainLog(TrainerCallback):
    """Writes every logged step to ``train.jsonl``: step, epoch, loss, learning rate, gradient norm, tokens and seconds.

    Args:
        folder: the run's folder.
        meter: counts tokens and seconds.
        losses: have the held-out loss from before training.
    """

    def __init__(self, folder: Path, meter: TokenMeter, losses: Losses) -> None:
        self.path, self.meter, self.losses = folder / LOG, meter, losses

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the file, or go on with it."""
        if state.is_world_process_zero:
            self.go_on_from(state.global_step)

    def go_on_from(self, step: int) -> None:
        """Keep the lines of a step and of those before it, and drop the others; none is kept of another run."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        before = [json.dumps({"step": step, "held_out_loss": loss}) for step, loss in self.losses.held_out]
        kept = [line for line in lines if _step_of(line) <= step] if step else before
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line."""
        if state.is_world_process_zero and logs and ("loss" in logs or "held_out_loss" in logs):
            line = {"step": state.global_step, **logs, "tokens": self.meter.tokens, "seconds": self.meter.seconds()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    # A line that a kill has cut is of no step.
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
