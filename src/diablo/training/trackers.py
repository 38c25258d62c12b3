"""The trackers of a run: where they write to, and how a resumed run goes on in theirs."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from diablo.errors import UserError, first_line
from diablo.recipes.recipe import Recipe

RUNS = "trackers.json"
_PROJECT = ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "COMET_PROJECT_NAME", "SWANLAB_PROJECT", "CLEARML_PROJECT")
_ID_VARIABLES = {"wandb": "WANDB_RUN_ID", "comet_ml": "COMET_EXPERIMENT_KEY"}
"""Where the trackers that let their users choose the id of a run read it."""
_GOING_ON = ("tensorboard", "wandb", "mlflow", "comet_ml", "trackio")
"""The trackers in which a resumed run goes on; in others it is a run of its own."""


class Trackers(TrainerCallback):
    """Tells trackers by environment variables where to write, and has a resumed run go on in the runs that they have.

    What the user has set in the environment stays as it is. The ids of the trackers' runs are in ``trackers.json``.

    Args:
        recipe: the recipe.
        resume: whether a run goes on.

    Attributes:
        going_on: the trackers in which the run goes on.
    """

    def __init__(self, recipe: Recipe, *, resume: bool) -> None:
        self.tracking, self.folder = recipe.tracking, recipe.output
        self.path = self.folder / RUNS
        before = json.loads(self.path.read_text(encoding="utf-8")) if resume and self.path.is_file() else {}
        # In another project there is no such run.
        is_same = before.get("project") == self.tracking.project
        told = before.get("report_to", []) if is_same else []
        self.going_on = [name for name in self.tracking.report_to if name in told and name in _GOING_ON]
        self.runs: dict[str, str] = {name: id for name, id in before.get("runs", {}).items() if name in self.going_on}

    def check(self) -> None:
        """Open what can be opened before there is anything to tell, since a model may take long to load.

        Raises:
            UserError: MLflow cannot open its store.
        """
        if "mlflow" not in self.tracking.report_to:
            return
        from mlflow.tracking import MlflowClient

        try:
            MlflowClient().search_experiments(max_results=1)
        except Exception as error:  # a store, a server or a file system can raise any error
            raise UserError(
                f"tracking.report_to: mlflow cannot open its store ({first_line(error)}); set MLFLOW_TRACKING_URI to a "
                "server, or, for a database in a file, install mlflow itself in place of mlflow-skinny."
            ) from None

    @contextmanager
    def environment(self) -> Generator[None]:
        """The environment variables while a run trains; what it has opened is closed in the end."""
        wanted = self._variables()
        given = {name: value for name, value in wanted.items() if name not in os.environ}
        had_wandb = _wandb_run() is not None
        os.environ.update(given)
        failed = 1
        try:
            yield
            failed = 0
        finally:
            for name in given:
                os.environ.pop(name, None)
            # Another run of this process would be told to the same.
            if "wandb" in self.tracking.report_to and not had_wandb and _wandb_run() is not None:
                sys.modules["wandb"].finish(exit_code=failed)

    def _variables(self) -> Mapping[str, str]:
        tracking = self.tracking
        wanted = {"TENSORBOARD_LOGGING_DIR": str(self.folder / "tensorboard")}
        if tracking.project is not None:
            wanted |= dict.fromkeys(_PROJECT, tracking.project)
        if tracking.tags:
            wanted["WANDB_TAGS"] = ",".join(tracking.tags)
            wanted["MLFLOW_TAGS"] = json.dumps(dict.fromkeys(tracking.tags, "true"))
        if "wandb" in tracking.report_to:
            wanted["WANDB_RESUME"] = "allow"
        for name in _ID_VARIABLES.keys() & set(tracking.report_to):
            wanted[_ID_VARIABLES[name]] = self.runs.get(name, secrets.token_hex(16))
        if "mlflow" in self.runs:
            # Its parameters are there; it refuses other values for them.
            wanted |= {"MLFLOW_RUN_ID": self.runs["mlflow"], "MLFLOW_MAX_LOG_PARAMS": "0"}
        return wanted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the trackers' runs, which have begun."""
        if not state.is_world_process_zero:
            return
        if not self.tracking.report_to:
            self.path.unlink(missing_ok=True)
            return
        if "mlflow" in self.tracking.report_to and (run := sys.modules["mlflow"].active_run()) is not None:
            self.runs["mlflow"] = run.info.run_id
        for name in _ID_VARIABLES.keys() & set(self.tracking.report_to):
            self.runs[name] = os.environ[_ID_VARIABLES[name]]
        content = {"project": self.tracking.project, "report_to": self.tracking.report_to, "runs": self.runs}
        self.path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @contextmanager
    def silent(self, handler: Any) -> Generator[None]:
        """Keep a log that they have been told of before the run went on from the trackers in which it goes on.

        Args:
            handler: the trainer's callback handler.
        """
        told = tuple(get_reporting_integration_callbacks(self.going_on))
        callbacks = handler.callbacks
        handler.callbacks = [each for each in callbacks if not isinstance(each, told)]
        try:
            yield
        finally:
            handler.callbacks = callbacks


def _wandb_run() -> Any:
    return sys.modules["wandb"].run if "wandb" in sys.modules else None
