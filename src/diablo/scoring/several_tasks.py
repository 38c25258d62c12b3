"""Scores several tasks, each by generation or by the likelihood of its choices, and writes files of answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from diablo.data.encoding import RowEncoder
from diablo.records.progress import ProgressReport
from diablo.scoring.asking import Decoding, as_multiple_choice
from diablo.scoring.generation import Score, evaluate_task
from diablo.scoring.likelihood import evaluate_choices
from diablo.tasks import Problem, Task


def score_tasks(
    model: Any,
    encoder: RowEncoder,
    tasks: Iterable[tuple[Task, Decoding | None]],
    *,
    console: Console,
    batch_size: int = 48,
    limit: int | None = None,
    problems: Mapping[str, Sequence[Problem]] | None = None,
    when: str = "",
) -> dict[str, Score]:
    """Score a model on several tasks, with a progress bar for each.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns problems into tokens as in training.
        tasks: pairs of a task and the decoding of its completions. With None for the decoding, the choices of the task
            are scored by likelihood.
        console: where progress is written.
        batch_size: number of sequences of a forward.
        limit: score only this many problems of each task, the first ones; all where None.
        problems: the problems by the tasks' names; those of the test splits where None.
        when: a word for the progress bar, such as ``before``.

    Returns:
        The scores by the tasks' names.

    Raises:
        UserError: a task that is to be scored by likelihood has no choices.
    """
    scores = {}
    for task, decoding in tasks:
        chosen = (task.problems("test") if problems is None else problems[task.name])[:limit]
        if decoding is None:
            multiple_choice = as_multiple_choice(task)
            total = sum(len(multiple_choice.choices(problem)) for problem in chosen)
        else:
            total = len(chosen) * decoding.samples
        with ProgressReport(console, f"scoring {task.name} {when}".rstrip(), total) as report:

            def progress(done: int, _: int, report: ProgressReport = report) -> None:
                report.update(done)

            shared: dict[str, Any] = {"batch_size": batch_size, "problems": chosen, "progress": progress}
            if decoding is None:
                scores[task.name] = evaluate_choices(model, encoder, multiple_choice, **shared)
            else:
                scores[task.name] = evaluate_task(model, encoder, task, decoding=decoding, **shared)
    return scores


def write_answers(path: Path, scores: Iterable[Score]) -> None:
    """Write a JSONL file with one line for each answer of each score."""
    with path.open("w", encoding="utf-8") as lines:
        for score in scores:
            for answer in score.answers:
                line = {"task": score.task, **answer.line()}
                lines.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
