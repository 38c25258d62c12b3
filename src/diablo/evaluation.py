"""Batched generation, and the scoring of tasks with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diablo.data.batching import collate
from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.losses import summed_completion_loss
from diablo.tasks import Problem, Task

Progress = Callable[[int, int], None]
"""Called with the number of finished and of all items."""


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[EncodedRow], pad_token_id: int, *, batch_size: int = 32) -> float:
    """Mean loss per supervised token over rows, in nats: every token counts the same, whatever its row and batch."""
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    total = 0.0
    with _evaluating(model):
        for first in range(0, len(by_length), batch_size):
            features = [row.features for row in by_length[first : first + batch_size]]
            batch = {name: values.to(model.device) for name, values in collate(features, pad_token_id).items()}
            total += summed_completion_loss(model, batch).item()
    return total / sum(row.supervised for row in rows)


@dataclass(frozen=True)
class Answer:
    """What a model wrote for a problem.

    Attributes:
        problem: the problem.
        text: the generated completion, without what follows the stop.
        right: whether it solves the problem.
    """

    problem: Problem
    text: str
    right: bool


@dataclass(frozen=True)
class Score:
    """The outcome of an evaluation.

    Attributes:
        task: name of the task.
        answers: one for each problem, in the task's order.
        seconds: wall time.
    """

    task: str
    answers: list[Answer]
    seconds: float

    @property
    def right(self) -> int:
        """The number of problems solved."""
        return sum(answer.right for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """The share of problems solved, from 0 to 1."""
        return self.right / len(self.answers)

    def summary(self) -> dict[str, Any]:
        """The figures, for a JSON file."""
        return {
            "task": self.task,
            "accuracy": self.accuracy,
            "right": self.right,
            "total": len(self.answers),
            "seconds": round(self.seconds, 1),
        }


def evaluate_task(
    model: Any,
    encoder: RowEncoder,
    task: Task,
    *,
    batch_size: int = 48,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score a model on a task's test problems by greedy generation.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns problems into prompts as in training.
        task: the task.
        batch_size: prompts generated together.
        limit: score only the first so many problems.
        progress: told of every finished batch.
    """
    problems = task.problems("test")[:limit]
    start = time.perf_counter()
    texts = generate(
        model,
        encoder,
        [encoder.prompt(problem.row) for problem in problems],
        max_new_tokens=task.max_new_tokens,
        stop_at_newline=task.stops_at_newline,
        batch_size=batch_size,
        progress=progress,
    )
    answers = [Answer(p, text, task.score(text, p)) for p, text in zip(problems, texts, strict=True)]
    return Score(task.name, answers, time.perf_counter() - start)


@torch.no_grad()
def generate(
    model: Any,
    encoder: RowEncoder,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_at_newline: bool = False,
    batch_size: int = 48,
    progress: Progress | None = None,
    **sampling: Any,
) -> list[str]:
    """Complete prompts, batched by length so that little is padded.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: gives the tokenizer and the stop tokens.
        prompts: token ids of each prompt.
        max_new_tokens: length limit of a completion.
        stop_at_newline: end a completion with its first line, leading blank lines not counted as one.
        batch_size: prompts generated together.
        progress: told of every finished batch.
        sampling: further options of transformers' ``generate``; greedy where none are given.

    Returns:
        The completions as text, in the order of the prompts, without the stop token.
    """
    tokenizer = encoder.tokenizer
    stops = set(encoder.stop_token_ids)
    if stop_at_newline:
        stops |= _newline_tokens(tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    with _evaluating(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            padded = tokenizer.pad(
                {"input_ids": [prompts[index] for index in batch]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                **padded,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stops),
                pad_token_id=tokenizer.pad_token_id,
                **({"do_sample": False} | sampling),
            )
            completions = output[:, padded["input_ids"].shape[1] :]
            decoded = tokenizer.batch_decode(completions, skip_special_tokens=True)
            for index, text in zip(batch, decoded, strict=True):
                texts[index] = text.rstrip("\n") if stop_at_newline else text
            if progress is not None:
                progress(first + len(batch), len(order))
    return texts


@contextmanager
def _evaluating(model: Any) -> Any:
    """Evaluation mode, and back to what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _newline_tokens(tokenizer: Any) -> set[int]:
    """Every token that contains a line break: any of them ends an answer of one line."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token for token, text in enumerate(texts) if "\n" in text}
