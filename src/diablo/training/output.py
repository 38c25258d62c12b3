"""The output folder of a run: what it must be like before, how it is opened, and what is written into it last."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from diablo.errors import UserError
from diablo.recipes.recipe import Recipe
from diablo.records.results import changed_settings, plot_losses, write_json
from diablo.training import saving

if TYPE_CHECKING:
    from diablo.planning.plan import Plan
    from diablo.records.log import RunLog
    from diablo.training.measuring import Losses
    from diablo.training.processes import Processes


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: what it goes on from; None where it starts anew.
        torn: for each later checkpoint, by its name, why it is not whole.
    """

    checkpoint: Path | None = None
    torn: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> list[str]:
        """A line for each checkpoint that is passed over."""
        return [f"{name} is not whole ({fault}): it is passed over and deleted." for name, fault in self.torn.items()]


def check_output(recipe: Recipe, *, resume: bool, overwrite: bool) -> Start:
    """Check that the output folder may be written to, and find the checkpoint to go on from. Changes nothing.

    Raises:
        UserError: it may not, or there is no checkpoint that the recipe can go on from.
    """
    folder = recipe.output
    last, torn = saving.last_whole(folder / "checkpoints")
    if resume:
        if last is None:
            reasons = [f"{name} is not whole ({fault})." for name, fault in torn.items()]
            reasons.append(
                f"output: there is no {'whole ' if torn else ''}checkpoint in {str(folder)!r} to resume from; run "
                f"without --resume{', with --overwrite' if torn else ''}, and set training.save_steps to have some."
            )
            raise UserError("\n".join(reasons))
        _check_same_run(recipe, folder / "recipe.yaml")
        return Start(last, torn)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise UserError(f"output: {str(folder)!r} has files that diablo did not write; give a new or empty folder.")
    is_unfinished = (last is not None or bool(torn)) and not (folder / "run.json").is_file()
    if is_unfinished and not overwrite:
        raise UserError(
            f"output: {str(folder)!r} holds an unfinished run; --resume goes on with it, --overwrite discards it."
        )
    return Start()


def _check_same_run(recipe: Recipe, path: Path) -> None:
    """A resumed run must be told what the interrupted one was told, reporting aside."""
    started = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    free = {"output", "evaluation", "merge", "eval_steps", "save_steps", "save_total_limit", "logging_steps"}
    # Another number of processes needs other ones; what they come to is checked when it is known.
    free |= {"batch_size", "gradient_accumulation"}
    # What an error of the run may have advised, and changes nothing of what is learned.
    free |= {"gradient_checkpointing", "on_nonfinite", "speed", "tracking", "push_to_hub"}
    if recipe.training.depends_on_held_out:
        free -= {"eval_steps"}
    names = changed_settings(started, recipe.model_dump(mode="json"))
    changed = [name for name in names if not free & set(name.split("."))]
    # What is scored says which rows are left out of training.
    if (started.get("evaluation") or {}).get("tasks") != recipe.evaluation.tasks:
        changed.append("evaluation.tasks")
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since the run that is to be resumed; set them back as {path} has them, or "
            "start a new run with --overwrite."
        )


def check_effective_batch(plan: Plan, processes: int, checkpoint: Path) -> None:
    """A resumed run takes as many rows a step as before, on however many processes: its batches are the same."""
    before = saving.about(checkpoint).get("effective_batch")
    if before != plan.effective_batch:
        training = plan.recipe.training
        what = "sequences" if training.packing else "rows"
        raise UserError(
            f"training.batch_size, training.gradient_accumulation: found {training.batch_size} and "
            f"{training.gradient_accumulation}, which on {processes} process{'es' * (processes > 1)} come to "
            f"{plan.effective_batch} {what} a step; the run that is to be resumed had {before}: choose what comes to "
            "that."
        )


def check_rewards(plan: Plan, checkpoint: Path) -> None:
    """A resumed run goes on with the functions that it began with."""
    before = {each["file"]: each["sha256"] for each in saving.about(checkpoint).get("rewards", []) if "file" in each}
    for each in plan.rewards.record() if plan.rewards else []:
        if "file" in each and before.get(each["file"], each["sha256"]) != each["sha256"]:
            raise UserError(
                f"objective.rewards: {each['file']} has changed since the run that is to be resumed; set it back, or "
                "start a new run with --overwrite."
            )


def start_output(processes: Processes, recipe: Recipe, model: Any, log: RunLog, *, resume: bool) -> Path | None:
    """Make the output folder and begin the log in it.

    Returns:
        What :func:`diablo.models.saving.save_start` saves in it, where it does.
    """
    # The checks above are to need no torch.
    from diablo.models.saving import save_start

    processes.wait()
    if processes.is_main:
        _open_output(recipe, resume=resume)
        log.open(recipe.output / "train.log", append=resume)
        save_start(model, recipe.output / "start")
    processes.wait()
    return recipe.output / "start" if (recipe.output / "start").is_dir() else None


def _open_output(recipe: Recipe, *, resume: bool) -> None:
    """Make the output folder and clear it of an earlier run."""
    folder = recipe.output
    folder.mkdir(parents=True, exist_ok=True)
    saving.clear_staging(folder / "checkpoints")
    if resume:
        # They would count as the latest where old ones are deleted.
        for name in saving.last_whole(folder / "checkpoints")[1]:
            shutil.rmtree(folder / "checkpoints" / name)
    for name in ("adapter", "model", "merged", "start", *([] if resume else ["checkpoints", "tensorboard"])):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "answers-before.jsonl", "answers-after.jsonl"):
        (folder / name).unlink(missing_ok=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def close_output(recipe: Recipe, record: dict[str, Any], losses: Losses) -> None:
    """Write what tells that the run is finished, last."""
    shutil.rmtree(recipe.output / "start", ignore_errors=True)
    # The trainer makes this folder even where nothing is saved in it.
    with contextlib.suppress(OSError):
        (recipe.output / "checkpoints").rmdir()
    title = f"{recipe.method.title} on {recipe.model}"
    if losses.rewards:
        # The loss of completions that the model has just written says nothing: it is near 0 all the way.
        curves, measure = (losses.rewards, losses.figures.get("reward", [])), "mean reward of a completion"
    else:
        curves, measure = (losses.train, losses.held_out), f"loss ({recipe.objective.loss_unit})"
    plot_losses(recipe.output / "loss.png", *curves, title, measure)
    write_json(recipe.output / "run.json", record)
