"""Multiple choice by likelihood: the candidate that the model finds most likely is its answer.

Nothing is generated, so that an answer cannot be wrong for its form: a model that was never trained on a task's format
is scored on what it knows. The two accuracies are those of the lm-evaluation-harness: by a candidate's log-likelihood
(``acc``), and by the log-likelihood for each of its characters (``acc_norm``), which does not favour short candidates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.evaluation import Progress, evaluating
from diablo.losses import completion_log_likelihoods
from diablo.progress import ProgressReport
from diablo.tasks import TASKS, MultipleChoice, Problem, Task


@dataclass(frozen=True)
class Candidate:
    """A candidate answer and how likely a model finds it.

    Attributes:
        text: the candidate as it was scored.
        log_likelihood: of its tokens given the prompt and each other, summed, in nats. The token that ends an answer
            does not count, as in the lm-evaluation-harness.
        tokens: how many tokens that is.
    """

    text: str
    log_likelihood: float
    tokens: int

    @property
    def per_token(self) -> float:
        """The mean log-likelihood of a token."""
        return self.log_likelihood / self.tokens

    @property
    def per_character(self) -> float:
        """The log-likelihood for each character of the text, surrounding space not counted."""
        return self.log_likelihood / len(self.text.strip())


@dataclass(frozen=True)
class Choice:
    """A problem and its candidates.

    Attributes:
        problem: the problem.
        candidates: in the task's order.
        right: index of the right one.
    """

    problem: Problem
    candidates: list[Candidate]
    right: int

    def is_right(self, measure: Callable[[Candidate], float]) -> bool:
        """Whether the right candidate is the first one with the largest measure."""
        measures = [measure(candidate) for candidate in self.candidates]
        return measures.index(max(measures)) == self.right


@dataclass(frozen=True)
class ChoiceScore:
    """The outcome of scoring a task by likelihood.

    Attributes:
        task: name of the task.
        choices: one for each problem, in the task's order.
        seconds: wall time.
    """

    task: str
    choices: list[Choice]
    seconds: float

    @property
    def acc(self) -> float:
        """The share of problems whose right candidate has the largest log-likelihood, from 0 to 1."""
        return self._share(lambda candidate: candidate.log_likelihood)

    @property
    def acc_norm(self) -> float:
        """The same by log-likelihood for each character."""
        return self._share(lambda candidate: candidate.per_character)

    def _share(self, measure: Callable[[Candidate], float]) -> float:
        return sum(choice.is_right(measure) for choice in self.choices) / len(self.choices)


def evaluate_choices(
    model: Any,
    encoder: RowEncoder,
    task: MultipleChoice,
    *,
    batch_size: int = 48,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ChoiceScore:
    """Score a model on a multiple-choice task's test problems by likelihood.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns problems into tokens as in training.
        task: the task.
        batch_size: candidates of a forward.
        limit: score only the first so many problems.
        progress: told of every finished batch, in candidates.

    Raises:
        UserError: a candidate or a prompt has no tokens.
        ValueError: the task's choices of a problem are not one right one among others.
    """
    problems = task.problems("test")[:limit]
    start = time.perf_counter()
    rows = [task.choices(problem) for problem in problems]
    scored = score_candidates(model, encoder, rows, batch_size=batch_size, progress=progress)
    choices = [Choice(*parts, _right(task, *parts)) for parts in zip(problems, scored, strict=True)]
    return ChoiceScore(task.name, choices, time.perf_counter() - start)


def write_choices(path: Path, scores: Iterable[ChoiceScore]) -> None:
    """Write each problem's candidates as a line of a JSONL file."""
    with path.open("w", encoding="utf-8") as lines:
        for score in scores:
            for choice in score.choices:
                line = {
                    "task": score.task,
                    "number": choice.problem.row.number,
                    "prompt": choice.problem.row.prompt,
                    "candidates": [asdict(candidate) for candidate in choice.candidates],
                    "right": choice.right,
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def as_multiple_choice(task: Task) -> MultipleChoice:
    """The task as one that can be scored by likelihood.

    Raises:
        UserError: its answers are written freely.
    """
    if not isinstance(task, MultipleChoice):
        allowed = [name for name, kind in TASKS.items() if issubclass(kind, MultipleChoice) and "test" in kind.splits]
        raise UserError(f"--likelihood: task {task.name!r} has no choices; allowed: {', '.join(allowed)}.")
    return task


def evaluate_tasks_by_likelihood(
    model: Any,
    encoder: RowEncoder,
    tasks: Iterable[MultipleChoice],
    *,
    console: Console,
    batch_size: int = 48,
    limit: int | None = None,
) -> list[ChoiceScore]:
    """Score a model on several multiple-choice tasks, with a bar for each; see :func:`evaluate_choices`."""
    scores = []
    for task in tasks:
        total = sum(len(task.choices(problem)) for problem in task.problems("test")[:limit])
        with ProgressReport(console, f"scoring {task.name}", total) as report:
            scores.append(
                evaluate_choices(
                    model,
                    encoder,
                    task,
                    batch_size=batch_size,
                    limit=limit,
                    progress=lambda done, _, report=report: report.update(done),  # type: ignore[misc]
                )
            )
    return scores


@torch.no_grad()
def score_candidates(
    model: Any,
    encoder: RowEncoder,
    problems: Sequence[Sequence[Row]],
    *,
    batch_size: int = 48,
    progress: Progress | None = None,
) -> list[list[Candidate]]:
    """The log-likelihood of each problem's candidates, batched by length so that little is padded.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns rows into tokens as in training.
        problems: for each problem its prompt with each candidate as the completion.
        batch_size: candidates of a forward.
        progress: told of every finished batch, in candidates.

    Returns:
        The candidates of each problem, in the order given.

    Raises:
        UserError: a candidate or a prompt has no tokens.
    """
    rows = [row for candidates in problems for row in candidates]
    encoded = [_encode(encoder, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: -len(encoded[index].input_ids))
    likelihoods = [0.0] * len(rows)
    with evaluating(model):
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            # Padding on the right lies behind every token that is scored, so that a causal model never sees it.
            batch = collate([encoded[index].features for index in indices], encoder.tokenizer.pad_token_id)
            moved = {name: values.to(model.device) for name, values in batch.items()}
            for index, value in zip(indices, completion_log_likelihoods(model, moved).tolist(), strict=True):
                likelihoods[index] = value
            if progress is not None:
                progress(first + len(indices), len(order))
    scored = iter(
        Candidate(_text(row), likelihood, tokens.supervised)
        for row, likelihood, tokens in zip(rows, likelihoods, encoded, strict=True)
    )
    return [[next(scored) for _ in candidates] for candidates in problems]


def _right(task: Task, problem: Problem, candidates: Sequence[Candidate]) -> int:
    right = [index for index, candidate in enumerate(candidates) if task.score(candidate.text, problem)]
    if len(right) != 1:
        raise ValueError(f"{task.name}: row {problem.row.number} has {len(right)} right candidates, not one.")
    return right[0]


def _encode(encoder: RowEncoder, row: Row) -> EncodedRow:
    """A row with its last completion supervised, and of that all but the stop token."""
    encoded = encoder.encode(row)
    start = len(encoder.prompt(row))
    stop = max(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    if start == 0:
        raise UserError(f"Row {row.number}: the prompt has no tokens, so that nothing predicts the candidate's first.")
    if stop == start or not _text(row).strip():
        raise UserError(f"Row {row.number}: the candidate {_text(row)!r} has no text to score.")
    labels = [IGNORED] * start + encoded.labels[start:stop] + [IGNORED] * (len(encoded.labels) - stop)
    return EncodedRow(encoded.number, encoded.input_ids, labels)


def _text(row: Row) -> str:
    return row.messages[-1]["content"] if row.messages else row.completion
