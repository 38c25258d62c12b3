"""Multiple choice by likelihood: the candidate that the model finds most likely is its answer.

Nothing is generated, so an answer cannot be wrong because of its form. A model that was never trained on a task's
format is scored on what it knows. The two accuracies are those of the lm-evaluation-harness. ``acc`` chooses the
candidate with the largest log-likelihood. ``acc_norm`` chooses the one with the largest log-likelihood per character,
which does not favour short candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.scoring.generation import Answer, Progress, Score, check_positions, evaluating
from diablo.scoring.losses import completion_log_likelihoods
from diablo.tasks import MultipleChoice, Problem, Task


@dataclass(frozen=True)
class Candidate:
    """A candidate answer and how likely a model finds it.

    Attributes:
        text: the candidate as it was scored.
        log_likelihood: the sum, over the candidate's tokens, of the log-likelihood of a token given the prompt and the
            tokens before it, in nats. The token that ends an answer does not count, as in the lm-evaluation-harness.
        tokens: number of these tokens.
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
        """The log-likelihood divided by the number of characters of the text, without surrounding space."""
        return self.log_likelihood / len(self.text.strip())


@dataclass(frozen=True)
class Choice(Answer):
    """The answer to a problem of multiple choice: the first of the candidates with the largest log-likelihood.

    Attributes:
        candidates: the candidates, in the task's order.
        target: index of the right candidate.
    """

    candidates: Sequence[Candidate] = ()
    target: int = 0

    @classmethod
    def among(cls, problem: Problem, candidates: Sequence[Candidate], target: int) -> Choice:
        """The choice of a model, given the candidates with their log-likelihoods.

        Args:
            problem: the problem.
            candidates: the candidates, in the task's order.
            target: index of the right candidate.
        """
        chosen = _favourite(candidates, _by_sum)
        return cls(problem, candidates[chosen].text, chosen == target, candidates=candidates, target=target)

    def is_right(self, measure: Callable[[Candidate], float]) -> bool:
        """Whether the model chooses the right candidate by a measure: the first candidate with the largest measure."""
        return _favourite(self.candidates, measure) == self.target

    def line(self) -> dict[str, Any]:
        """The choice as it is written to a file of answers."""
        candidates = [asdict(candidate) for candidate in self.candidates]
        return super().line() | {"candidates": candidates, "target": self.target}


def _favourite(candidates: Sequence[Candidate], measure: Callable[[Candidate], float]) -> int:
    measures = [measure(candidate) for candidate in candidates]
    return measures.index(max(measures))


def _by_sum(candidate: Candidate) -> float:
    return candidate.log_likelihood


def evaluate_choices(
    model: Any,
    encoder: RowEncoder,
    task: MultipleChoice,
    *,
    batch_size: int = 48,
    limit: int | None = None,
    problems: Sequence[Problem] | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score a model on a multiple-choice task's problems by likelihood.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns problems into tokens as in training.
        task: the task.
        batch_size: number of sequences of a forward.
        limit: score only this many problems, the first ones; all where None.
        problems: the problems; those of the test split where None.
        progress: called after each batch, in candidates.

    Raises:
        UserError: a candidate or a prompt has no tokens.
        ValueError: a problem does not have exactly one right candidate.
    """
    problems = (task.problems("test") if problems is None else problems)[:limit]
    start = time.perf_counter()
    rows = [task.choices(problem) for problem in problems]
    scored = score_candidates(model, encoder, rows, batch_size=batch_size, progress=progress)
    choices = [
        Choice.among(problem, candidates, _target(task, problem, candidates))
        for problem, candidates in zip(problems, scored, strict=True)
    ]
    metrics = {
        "acc": sum(choice.right for choice in choices) / len(choices),
        "acc_norm": sum(choice.is_right(lambda each: each.per_character) for choice in choices) / len(choices),
    }
    return Score(task.name, choices, time.perf_counter() - start, metrics, "likelihood")


@torch.no_grad()
def score_candidates(
    model: Any,
    encoder: RowEncoder,
    problems: Sequence[Sequence[Row]],
    *,
    batch_size: int = 48,
    progress: Progress | None = None,
) -> list[list[Candidate]]:
    """The log-likelihood of each problem's candidates.

    Sequences are batched by length, so that there is little padding. Candidates that differ only in their last token,
    as ``answer1`` and ``answer2`` may, share one sequence.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns rows into tokens as in training.
        problems: for each problem one row a candidate: the prompt with the candidate as its completion.
        batch_size: number of sequences of a forward.
        progress: called after each batch, in candidates.

    Returns:
        The candidates of each problem, in the order given.

    Raises:
        UserError: a candidate or a prompt has no tokens, or both have more than the model has learned positions.
    """
    rows = [row for candidates in problems for row in candidates]
    encoded = [_encode(encoder, row) for row in rows]
    check_positions(model, encoder, max((len(tokens.input_ids) for tokens in encoded), default=0))
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, tokens in enumerate(encoded):
        # Rows share a sequence only where their supervised tokens start at the same place.
        alike.setdefault((tokens.supervised, *tokens.input_ids[:-1]), []).append(index)
    groups = sorted(alike.values(), key=lambda group: -len(encoded[group[0]].input_ids))
    likelihoods, done = [0.0] * len(rows), 0
    with evaluating(model):
        for first in range(0, len(groups), batch_size):
            together = groups[first : first + batch_size]
            # Rows are padded on the right, behind every scored token, where a causal model does not look.
            batch = collate([encoded[group[0]].features for group in together], encoder.tokenizer.pad_token_id)
            moved = {name: values.to(model.device) for name, values in batch.items()}
            before, of_last = completion_log_likelihoods(model, moved)
            for group, sum_before, log_probabilities in zip(together, before.tolist(), of_last, strict=True):
                lasts = [encoded[index].input_ids[-1] for index in group]
                for index, value in zip(group, log_probabilities[lasts].tolist(), strict=True):
                    likelihoods[index] = sum_before + value
            done += sum(map(len, together))
            if progress is not None:
                progress(done, len(rows))
    scored = iter(
        Candidate(_text(row), likelihood, tokens.supervised)
        for row, likelihood, tokens in zip(rows, likelihoods, encoded, strict=True)
    )
    return [[next(scored) for _ in candidates] for candidates in problems]


def _target(task: Task, problem: Problem, candidates: Sequence[Candidate]) -> int:
    right = [index for index, candidate in enumerate(candidates) if task.score(candidate.text, problem)]
    if len(right) != 1:
        raise ValueError(f"{task.name}: row {problem.row.number} has {len(right)} right candidates, not one.")
    return right[0]


def _encode(encoder: RowEncoder, row: Row) -> EncodedRow:
    """A row as tokens. Only its last completion is supervised, and the row ends before the stop token."""
    encoded = encoder.encode(row)
    start = len(encoder.prompt(row)) if encoded.read is None else encoded.read
    stop = max(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    if start == 0:
        raise UserError(f"Row {row.number}: the prompt has no tokens, so that nothing predicts the candidate's first.")
    if stop == start or not _text(row).strip():
        raise UserError(f"Row {row.number}: the candidate {_text(row)!r} has no text to score.")
    labels = [IGNORED] * start + encoded.labels[start:stop]
    return EncodedRow(encoded.number, encoded.input_ids[:stop], labels, read=encoded.read)


def _text(row: Row) -> str:
    return row.messages[-1]["content"] if row.messages else row.completion
