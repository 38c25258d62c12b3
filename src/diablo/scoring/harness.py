"""Scores by EleutherAI's lm-evaluation-harness, so that figures can be compared with published ones.

The harness is an optional dependency. It has its own tasks, prompts and measures; ours are in :mod:`diablo.tasks`.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diablo.data import RowEncoder
from diablo.errors import UserError, did_you_mean
from diablo.records.results import describe_versions


@dataclass(frozen=True)
class HarnessFigure:
    """One figure that the harness gives.

    Attributes:
        task: the harness's name of the task or group.
        metric: what was measured, such as ``acc_norm``, with the harness's filter in parentheses where there is one.
        value: the figure. A share, such as an accuracy, is from 0 to 1.
        error: standard error of the figure over the problems; None where the harness gives none.
        shots: number of worked examples in each prompt; None for a group.
        problems: number of problems that were scored; None for a group.
    """

    task: str
    metric: str
    value: float
    error: float | None
    shots: int | None
    problems: int | None


def load_harness_tasks(names: Sequence[str], include: Path | None = None) -> list[Any]:
    """Find tasks of the harness and load their data. This needs no model.

    Args:
        names: names of tasks, groups or tags.
        include: a folder with YAML files of further tasks, in the harness's format.

    Returns:
        Task objects of the harness, for :func:`run_harness`.

    Raises:
        UserError: the harness or the folder is missing, a name is unknown, a task's data cannot be loaded, or a task
            would run code that the model writes.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError('--harness: lm-eval is not installed; pip install "diablo-peft[harness]".') from None
    if include is not None and not include.is_dir():
        raise UserError(f"--harness-include: there is no folder {str(include)!r}; give one that holds task files.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Reading the harness's own 14,000 task files takes seconds. It is left out where the user's files have all names.
    own = TaskManager(include_path=include, include_defaults=False)
    manager = own if set(names) <= set(own.all_tasks) else TaskManager(include_path=include)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UserError(
                f"--harness: there is no task {name!r} among the {len(known):,} of lm-eval"
                f"{f' and of {include}' if include else ''}; `lm-eval ls tasks` lists them.{did_you_mean(name, known)}"
            )
    tasks = [task for name in names for task in _load(manager, name)]
    for task in tasks:
        for single in task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]:
            if single.config.unsafe_code:
                raise UserError(
                    f"--harness: {single.task_name} runs code that the model writes, and the harness does not confine "
                    "it; leave it out."
                )
    return tasks


def run_harness(
    model: Any,
    encoder: RowEncoder,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 48,
) -> list[HarnessFigure]:
    """Score a model on tasks of the harness.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: gives the tokenizer, and says whether prompts go through its chat template.
        tasks: what :func:`load_harness_tasks` returned.
        limit: score only this many problems of each task, the first ones; all where None.
        num_fewshot: number of worked examples in each prompt; each task's own number where None. A task that fixes the
            number at 0 keeps it.
        batch_size: number of requests of a forward.

    Raises:
        UserError: the harness refuses the combination of tasks or settings.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        outcome: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            # The tasks are loaded already. Without this, the harness would read all its task files once more.
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=encoder.chat,
            log_samples=False,
        )
    except ValueError as error:
        raise UserError(f"--harness: {error}") from None
    return [
        figure
        for task, measured in (outcome["results"] | outcome.get("groups", {})).items()
        for figure in _figures(task, measured, outcome)
    ]


def harness_record(figures: Sequence[HarnessFigure], settings: dict[str, Any]) -> dict[str, Any]:
    """The figures with the settings and versions that they were measured with, for a JSON file."""
    versions = describe_versions() | {"lm_eval": importlib.metadata.version("lm_eval")}
    return settings | {"figures": [asdict(figure) for figure in figures], "versions": versions}


def _load(manager: Any, name: str) -> list[Any]:
    """The tasks that a name stands for. A group is one task object; a tag gives each of its tasks."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # a hub, a cache or a task's own code can raise any error
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"--harness: the data of {name!r} cannot be loaded ({reason}); the harness reads it from the hub, unless a "
            "task file in --harness-include names local files."
        ) from None
    group = loaded["groups"].get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _figures(task: str, measured: dict[str, Any], outcome: dict[str, Any]) -> list[HarnessFigure]:
    figures = []
    for key, value in measured.items():
        # The keys of figures are "metric,filter". Keys without a comma hold names and sizes.
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = measured.get(f"{metric}_stderr,{kind}")
        figures.append(
            HarnessFigure(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=float(value),
                error=float(error) if isinstance(error, (int, float)) else None,
                shots=outcome["n-shot"].get(task),
                problems=outcome["n-samples"].get(task, {}).get("effective"),
            )
        )
    return figures
