"""What all trainers of runs have in common: whole checkpoints, a checked optimizer, and logs of their own."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from diablo.data.batching import LengthGroupedSampler
from diablo.data.encoding import EncodedRow
from diablo.errors import UserError
from diablo.models.adapters import read_trained
from diablo.models.saving import saving_rows_alone
from diablo.planning import preflight
from diablo.planning.optimizers import group_members
from diablo.planning.plan import Plan
from diablo.recipes.training import ParameterGroup
from diablo.records.log import LOGGER
from diablo.records.progress import TrainingProgress
from diablo.training import saving
from diablo.training.averaging import Average
from diablo.training.engines import Engine, trained_parameters
from diablo.training.measuring import HeldOutLoss
from diablo.training.safeguards import FiniteLosses
from diablo.training.trackers import Trackers
from diablo.training.tracking import HELD_OUT, KINDS, TrainLog


class RunTrainer(Trainer, ABC):
    """A trainer over rows that are encoded already; a class beside it, one of TRL's trainers, has the loss.

    Args:
        plan: gives the sampler, the optimizer's groups and what is said of the loss.
        progress: the training bar.
        finite: looks after the losses.
        average: averages the trained parameters.
        held_out: measures the held-out loss, and keeps what is best.
        train_log: writes ``train.jsonl``.
        trackers: those that the run is told to.
        engine: how the processes hold the model.
        options: arguments of the trainer beside it.

    Attributes:
        when_sharded: called once the model is spread over the processes, before a checkpoint is loaded.
        parameters_kept: the parameters that this process keeps.
    """

    lr_scheduler: Any

    def __init__(
        self,
        *,
        plan: Plan,
        progress: TrainingProgress,
        finite: FiniteLosses,
        average: Average,
        held_out: HeldOutLoss,
        train_log: TrainLog,
        trackers: Trackers,
        engine: Engine,
        **options: Any,
    ) -> None:
        self.plan = plan
        self.sampler: LengthGroupedSampler = plan.sampler
        self.progress = progress
        self.finite = finite
        self.average = average
        self.held_out = held_out
        self.engine = engine
        self.when_sharded: Callable[[], None] = lambda: None
        self._staging: Path | None = None
        self._logged = 0
        # Not all of TRL's trainers hand it on.
        optimizer = options.pop("optimizer_cls_and_kwargs")
        super().__init__(**options)
        self.optimizer_cls_and_kwargs = optimizer
        self.train_log = train_log
        self.trackers = trackers
        # Behind the trackers' own callbacks: what is a line of the log was told to them.
        self.add_callback(trackers)
        self.add_callback(train_log)
        self.parameters_kept = engine.kept(options["model"])

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedSampler:
        return self.sampler

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:  # pyrefly: ignore[bad-override]
        """The optimizer, checked: an engine makes another of it."""
        optimizer = super().create_optimizer(*arguments)
        model = self.accelerator.unwrap_model(self.model)
        split_groups(optimizer, model, self.plan.recipe.training.optimizer.groups)
        preflight.check_optimizer(optimizer, model)
        # DeepSpeed would drop a group without parameters, and a checkpoint is the same whichever engine writes it.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self.engine.created(optimizer)
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not self.engine.shards:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # Its own checkpoints of sharded models fit as many processes as have written them.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        model: Any = self.model
        self.engine.prepared(model, self.optimizer)
        self.parameters_kept = self.engine.kept(model)
        self.when_sharded()
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self.engine.load_trained(model, read_trained(checkpoint, model))
            load = functools.partial(torch.load, map_location="cpu", weights_only=True)
            self.engine.load_optimizer_state(self.optimizer, load(checkpoint / OPTIMIZER_NAME))
            self.lr_scheduler.load_state_dict(load(checkpoint / SCHEDULER_NAME))
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained parameters, whole."""
        if not self.engine.shards:
            super().save_model(output_dir, _internal_call)
            return
        model: Any = self.model
        trained = self.engine.trained(model)
        if self.args.should_save:
            self._save(output_dir, state_dict=trained)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with saving_rows_alone(self.accelerator.unwrap_model(self.model)):
            super()._save(output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.engine.shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.engine.optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    @abstractmethod
    def held_out_figures(self) -> dict[str, float]:
        """What is measured on held-out rows: ``loss``, a mean, and other figures by their names."""

    def prepare_for_rows(self) -> None:
        """Work out what the loss needs to know of the model as it is before training."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the loss of the steps that were not left out.

        What is measured after training goes to ``train.jsonl`` alone: the trackers have closed the run by then.
        """
        if not self.is_in_train and any(kind in logs for kind in HELD_OUT):
            self.train_log.on_log(self.args, self.state, self.control, logs)
            return
        if "loss" in logs:
            mean = self.finite.mean_loss(logs["loss"], self.state.global_step - self._logged)
            self._logged = self.state.global_step
            if mean is None:
                logs = {name: value for name, value in logs.items() if name != "loss"}
            else:
                logs["loss"] = mean
        kind = next((kind for kind in KINDS if kind in logs), None)
        is_told = kind is not None and self.state.global_step <= self.train_log.told.get(kind, 0)
        is_due = self.control.should_log
        with self.trackers.silent(self.callback_handler) if is_told else nullcontext(), self._figures_of(kind):
            super().log(logs, start_time)
        if kind in HELD_OUT:
            # The trainer takes any log for the step's own, which may still be due.
            self.control.should_log = is_due

    @contextmanager
    def _figures_of(self, kind: str | None) -> Generator[None]:
        """Keep TRL's figures of training steps for the log of these: it adds them to whatever is logged next."""
        figures: dict[str, Any] | None = getattr(self, "_metrics", None)
        if figures is None or kind not in HELD_OUT:
            yield
            return
        kept, figures["train"] = figures["train"], defaultdict(list)
        try:
            yield
        finally:
            figures["train"] = kept

    def take_over(self, checkpoint: Path, last_step: int) -> bool:
        """Take from a checkpoint what the trainer does not, before training goes on.

        Args:
            checkpoint: the checkpoint.
            last_step: the number of the run's last step.

        Returns:
            Whether nothing is left to train, the checkpoint being that of the last step or of the one that held-out
            losses made the last: then it is loaded.
        """
        about = saving.about(checkpoint)
        self.finite.skipped = [int(step) for step in about["skipped_steps"]]
        self.held_out.losses.held_out = [(int(step), float(loss)) for step, loss in about["held_out_loss"]]
        self.held_out.losses.scores = [(int(step), float(score)) for step, score in about["validation_score"]]
        self.held_out.losses.figures = {
            name: [(int(step), float(value)) for step, value in measured]
            for name, measured in about["held_out_figures"].items()
        }
        self.held_out.best = saving.read_tensors(checkpoint / saving.BEST)
        self.average.steps = int(about["averaged_steps"])
        average = saving.read_tensors(checkpoint / saving.AVERAGE)
        self.average.values = {name: values.to(self.args.device) for name, values in average.items()}
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._logged = state.global_step
        if state.global_step < last_step and not self.held_out.is_over:
            return False
        if self.engine.shards:
            self._prepare_for_training(last_step, self.get_train_dataloader(), str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
        self.state = state
        if self.is_world_process_zero():
            self.train_log.go_on_from(state.global_step)
        return True

    def _about(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors, for :meth:`take_over`."""
        return {
            "effective_batch": self.sampler.batch_size,
            "skipped_steps": self.finite.skipped,
            "held_out_loss": self.held_out.losses.held_out,
            "validation_score": self.held_out.losses.scores,
            "held_out_figures": self.held_out.losses.figures,
            "averaged_steps": self.average.steps,
        }

    def _write_own(self, staged: Path) -> None:
        """Write into a checkpoint what only the class beside this one needs."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint that is there whole or not at all."""
        folder = Path(str(self.args.output_dir))
        try:
            if self.args.should_save:
                saving.clear_staging(folder)
                (folder / saving.STAGING).mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            self._staging = folder / saving.STAGING
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = self._staging / f"checkpoint-{self.state.global_step}"
                saving.write_tensors(staged / saving.BEST, self.held_out.best)
                saving.write_tensors(staged / saving.AVERAGE, self.average.values)
                self._write_own(staged)
                saving.publish(folder, self._about())
                LOGGER.info("checkpoint of step %d saved", self.state.global_step)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            if not saving.is_failed_write(error):
                raise
            saving.clear_staging(folder)
            last, _ = saving.last_whole(folder)
            kept = f"{last.name} is intact" if last else "there is no earlier one"
            raise UserError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {str(folder)!r}: {error}. "
                f"Is the disk full? {kept[0].upper()}{kept[1:]}: make room and go on with --resume."
            ) from None
        finally:
            self._staging = None
        if self.args.should_save:
            rotate_checkpoints(str(folder), self.args.save_total_limit)


def split_groups(optimizer: torch.optim.Optimizer, model: Any, groups: Sequence[ParameterGroup]) -> None:
    """Give some parameters of an optimizer that has made no step a learning rate or a weight decay of their own.

    Args:
        optimizer: holds all trained parameters of the model; each of its groups is cut where it has some of these.
        model: the model.
        groups: what the recipe says.

    Raises:
        UserError: a group has no parameter, or two have the same one.
    """
    trained = trained_parameters(model)
    before = list(optimizer.param_groups)
    for group, names in zip(groups, group_members(trained, groups), strict=True):
        own = {"lr": group.learning_rate, "weight_decay": group.weight_decay}
        own = {name: value for name, value in own.items() if value is not None}
        members = {id(trained[name]) for name in names}
        for held in before:
            taken = [parameter for parameter in held["params"] if id(parameter) in members]
            held["params"] = [parameter for parameter in held["params"] if id(parameter) not in members]
            if taken:
                optimizer.add_param_group({**held, "params": taken, **own})


def number_of(row: EncodedRow) -> str:
    """The number of a row, with its file where there are several."""
    return f"{row.number} of {row.source}" if row.source else str(row.number)
