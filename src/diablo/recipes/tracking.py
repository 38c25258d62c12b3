"""Trackers, as a recipe names them: where the course of a run is shown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from diablo.errors import did_you_mean
from diablo.recipes.section import Names, Section

TRACKERS = (
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "comet_ml",
    "clearml",
    "dvclive",
    "swanlab",
    "neptune",
    "azure_ml",
    "dagshub",
    "flyte",
    "codecarbon",
    "kubeflow",
)
"""The names of the trackers that transformers integrates."""


def _none_is_none(value: Any) -> Any:
    """As elsewhere, ``none`` is no tracker."""
    return [] if value in ("none", ["none"]) else value


class Tracking(Section):
    """The trackers that are told of a run; ``train.jsonl`` is written in any case."""

    report_to: Annotated[Names, BeforeValidator(_none_is_none)] = Field(
        [], description="a tracker or a list of trackers, such as tensorboard, wandb or mlflow: what is told of the run"
    )
    name: str | None = Field(
        None, min_length=1, description="text: the run's name in the trackers; the name of its folder if not given"
    )
    project: str | None = Field(None, min_length=1, description="text: the project, or experiment, that the run is in")
    tags: Names = Field([], description="a word or a list of words: the run's tags, for wandb and mlflow")

    def check(self) -> None:
        """Check the names.

        Raises:
            ValueError: with the message for the user.
        """
        for name in self.report_to:
            if name not in TRACKERS:
                raise ValueError(
                    f"tracking.report_to: found {name!r}; allowed: {', '.join(TRACKERS)}.{did_you_mean(name, TRACKERS)}"
                )
        if not self.report_to and (self.name or self.project or self.tags):
            raise ValueError(
                "tracking: found a name, project or tags without report_to, which have no effect; name a tracker."
            )
