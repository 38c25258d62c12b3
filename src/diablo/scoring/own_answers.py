"""A model's own answers to problems, generated, judged and written as rows for preference objectives."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from diablo.data.encoding import RowEncoder
from diablo.errors import Interrupted, UserError
from diablo.records.progress import ProgressReport
from diablo.scoring.asking import Decoding
from diablo.scoring.generation import Answer, evaluate_task
from diablo.scoring.pairs import Choice, Tally, choose_rows
from diablo.tasks import Problem, Task


def write_own_answers(
    model: Any,
    encoder: RowEncoder,
    asked: Sequence[tuple[Task, Decoding]],
    problems: Mapping[str, Sequence[Problem]],
    path: Path,
    choice: Choice,
    *,
    console: Console,
    batch_size: int = 48,
) -> dict[str, Tally]:
    """Let a model answer problems, and write rows that its right and wrong answers make.

    After each batch its rows are written, as whole lines. A file that is there is overwritten, but not before there is
    a first row.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns problems into prompts as in training.
        asked: the tasks, each with how answers are generated.
        problems: the problems by the tasks' names.
        path: the JSONL file.
        choice: which rows to make.
        console: where progress is written.
        batch_size: number of prompts that are completed together.

    Returns:
        The figures by the tasks' names.

    Raises:
        UserError: no row came of the answers, or the file cannot be written.
        Interrupted: somebody pressed Ctrl-C. The rows that were written stay.
    """
    tallies = {task.name: Tally() for task, _ in asked}

    def total() -> Tally:
        return sum(tallies.values(), Tally())

    try:
        for task, decoding in asked:
            of_task = problems[task.name]
            at_once = max(1, batch_size // decoding.samples)
            with ProgressReport(console, f"answering {task.name}", len(of_task) * decoding.samples) as report:
                for first in range(0, len(of_task), at_once):
                    # Each batch draws numbers of its own.
                    seed = random.Random(f"answers-{decoding.seed}-{task.name}-{first}").getrandbits(32)
                    score = evaluate_task(
                        model,
                        encoder,
                        task,
                        decoding=replace(decoding, seed=seed),
                        batch_size=batch_size,
                        problems=of_task[first : first + at_once],
                        progress=_behind(report, first * decoding.samples),
                    )
                    rows, tally = _rows_of(task, score.answers, decoding.samples, choice, chat=encoder.chat)
                    if rows:
                        _write(path, rows, append=total().rows > 0)
                    tallies[task.name] += tally
    except KeyboardInterrupt:
        raise Interrupted(_stopped(total(), problems, path), signal.SIGINT) from None
    if not total().rows:
        raise UserError(total().why_no_rows(choice, asked[0][1].samples))
    return tallies


def _behind(report: ProgressReport, done_before: int) -> Callable[[int, int], None]:
    """What shows the progress of a batch, behind those that are done."""
    return lambda done, _: report.update(done_before + done)


def _rows_of(
    task: Task, answers: Sequence[Answer], samples: int, choice: Choice, *, chat: bool
) -> tuple[list[dict[str, Any]], Tally]:
    rows, tally = list[dict[str, Any]](), Tally()
    for first in range(0, len(answers), samples):
        of_problem = answers[first : first + samples]
        made, figures = choose_rows(task, of_problem[0].problem, of_problem, choice, chat=chat)
        rows, tally = rows + made, tally + figures
    return rows, tally


def _write(path: Path, rows: Sequence[dict[str, Any]], *, append: bool) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(lines)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}.") from None


def _stopped(done: Tally, problems: Mapping[str, Sequence[Problem]], path: Path) -> str:
    of_all = f"{done.problems} of {sum(map(len, problems.values()))} problems"
    if not done.rows:
        return f"Stopped after {of_all}, of which no row has come; nothing was written."
    return f"Stopped after {of_all}. {str(path)!r} has their {done.rows} rows, which can be trained on."
