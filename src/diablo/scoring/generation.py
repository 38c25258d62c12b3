"""Batched generation, and the scoring of a task with it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diablo.data.batching import collate_rows
from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.vision import ImageProcessor
from diablo.errors import UserError
from diablo.models.loading import learned_positions
from diablo.scoring.asking import Decoding, decoding_for
from diablo.scoring.losses import summed_completion_loss
from diablo.tasks import Problem, Protocol, Task

Progress = Callable[[int, int], None]
"""Called with the number of finished items and the number of all items."""


@torch.no_grad()
def held_out_loss(
    model: Any,
    rows: Sequence[EncodedRow],
    pad_token_id: int,
    *,
    batch_size: int = 32,
    images: ImageProcessor | None = None,
) -> float:
    """Mean loss per supervised token over rows, in nats. Every token counts the same, whatever its row and batch.

    Args:
        model: a causal language model or ``PeftModel``.
        rows: encoded rows; at least one token is supervised.
        pad_token_id: id of the padding token.
        batch_size: rows of a forward.
        images: reads the pixels of rows that have images; None where none has any.
    """
    by_length = sorted(rows, key=lambda row: len(row.input_ids))
    total = 0.0
    with evaluating(model):
        for first in range(0, len(by_length), batch_size):
            batch = collate_rows(by_length[first : first + batch_size], pad_token_id, images)
            moved = {name: values.to(model.device) for name, values in batch.items()}
            total += summed_completion_loss(model, moved).item()
    return total / sum(row.supervised for row in rows)


@dataclass(frozen=True)
class Answer:
    """What a model wrote for a problem.

    Attributes:
        problem: the problem.
        text: the generated completion, up to the stop token.
        right: whether it solves the problem.
        sample: index of this completion among those of the problem, from 0.
        finished: whether the model has ended it, and not the limit on its length.
    """

    problem: Problem
    text: str
    right: bool
    sample: int = 0
    finished: bool = True

    def line(self) -> dict[str, Any]:
        """The answer as it is written to a file of answers."""
        return {
            "number": self.problem.row.number,
            "sample": self.sample,
            "prompt": self.problem.row.prompt,
            "text": self.text,
            "answer": self.problem.answer,
            "right": self.right,
        }


@dataclass(frozen=True)
class Score:
    """The outcome of an evaluation.

    Attributes:
        task: name of the task.
        answers: one for each completion, in the order of the task's problems. The samples of a problem follow one
            another.
        seconds: wall time.
        metrics: the task's figures, with the headline figure first.
        protocol: how the answers were read from the completions; ``"likelihood"`` where nothing was generated.
    """

    task: str
    answers: Sequence[Answer]
    seconds: float
    metrics: dict[str, float]
    protocol: Protocol | Literal["likelihood"]

    @property
    def right(self) -> int:
        """The number of completions that solve their problem."""
        return sum(answer.right for answer in self.answers)

    @property
    def headline(self) -> float:
        """The headline figure."""
        return next(iter(self.metrics.values()))

    def summary(self) -> dict[str, Any]:
        """The figures, for a JSON file."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            "headline": next(iter(self.metrics)),
            **self.metrics,
            "right": self.right,
            "total": len(self.answers),
            "seconds": round(self.seconds, 1),
        }


def evaluate_task(
    model: Any,
    encoder: RowEncoder,
    task: Task,
    *,
    decoding: Decoding | None = None,
    batch_size: int = 48,
    limit: int | None = None,
    problems: Sequence[Problem] | None = None,
    progress: Progress | None = None,
) -> Score:
    """Score a model on a task's problems by generation.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: turns problems into prompts as in training.
        task: the task.
        decoding: how completions are generated; as the task asks where None.
        batch_size: number of prompts that are completed together.
        limit: score only this many problems, the first ones; all where None.
        problems: the problems; those of the test split where None.
        progress: called after each batch, in completions.
    """
    decoding = decoding or decoding_for(task)
    problems = (task.problems("test") if problems is None else problems)[:limit]
    start = time.perf_counter()
    prompts = [encoder.prompt(problem.row) for problem in problems]
    # The random state is put back afterwards, so that sampling here does not change the training that goes on later.
    with torch.random.fork_rng(enabled=bool(decoding.temperature)):
        if decoding.temperature:
            torch.manual_seed(decoding.seed)
        completions = complete(
            model,
            encoder,
            [prompt for prompt in prompts for _ in range(decoding.samples)],
            max_new_tokens=task.max_new_tokens,
            stop_at_newline=task.stops_at_newline,
            batch_size=batch_size,
            progress=progress,
            **decoding.options,
        )
    answered = [problem for problem in problems for _ in range(decoding.samples)]
    verdicts = task.score_all([completion.text for completion in completions], answered)
    answers = [
        Answer(problem, completion.text, right, index % decoding.samples, completion.finished)
        for index, (problem, completion, right) in enumerate(zip(answered, completions, verdicts, strict=True))
    ]
    starts = range(0, len(answers), decoding.samples)
    rights = [[answer.right for answer in answers[first : first + decoding.samples]] for first in starts]
    return Score(task.name, answers, time.perf_counter() - start, task.metrics(problems, rights), task.protocol)


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind a prompt.

    Attributes:
        text: the text, as it stands behind the prompt, without the stop token.
        finished: whether it ended with a stop token, and not at the limit on its length.
    """

    text: str
    finished: bool


def generate(model: Any, encoder: RowEncoder, prompts: Sequence[list[int]], **options: Any) -> list[str]:
    """The texts that :func:`complete` gives, which says what the options are."""
    return [completion.text for completion in complete(model, encoder, prompts, **options)]


def complete_row(model: Any, encoder: RowEncoder, row: EncodedRow, **options: Any) -> Completion:
    """Complete the prompt of a row, which may have images.

    Args:
        model: as for :func:`complete`.
        encoder: likewise.
        row: the prompt's tokens and images.
        options: what :func:`complete` takes.
    """
    given: dict[str, Any] = {}
    if encoder.images is not None:
        given = encoder.images.tensors([row.images], torch.tensor([row.input_ids]))
    moved: dict[str, Any] = {name: values.to(model.device) for name, values in given.items()}
    return complete(model, encoder, [row.input_ids], **moved, **options)[0]


@torch.no_grad()
def complete(
    model: Any,
    encoder: RowEncoder,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop_at_newline: bool = False,
    batch_size: int = 48,
    progress: Progress | None = None,
    **sampling: Any,
) -> list[Completion]:
    """Complete prompts, batched by length so that little is padded.

    Prompts are padded where a model does not look: on the left, so that all completions begin at the same place; and on
    the right, behind what the encoder of an encoder-decoder reads.

    Args:
        model: a causal language model or ``PeftModel``.
        encoder: gives the tokenizer and the stop tokens.
        prompts: token ids of each prompt.
        max_new_tokens: the most tokens of a completion. A model with learned positions writes no more than they leave.
        stop_at_newline: end a completion at its first token with a line break, and take away the line break at its end.
        batch_size: number of prompts that are completed together.
        progress: called after each batch, in prompts.
        sampling: further options of transformers' ``generate``, and what the model is given of images; greedy where
            no options are given.

    Returns:
        The completions, in the order of the prompts.

    Raises:
        UserError: a prompt fills the learned positions of the model.
    """
    tokenizer = encoder.tokenizer
    stops = stops_of(encoder, stop_at_newline=stop_at_newline)
    completions: dict[int, Completion] = {}
    side = "right" if encoder.encoder_decoder else "left"
    lengths = [len(prompt) for prompt in prompts]
    positions = check_positions(model, encoder, max(lengths, default=0) + 1)
    with evaluating(model):
        for batch, room in _batches(lengths, batch_size, max_new_tokens, positions):
            padded = tokenizer.pad(
                {"input_ids": [prompts[index] for index in batch]}, padding_side=side, return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                **padded,
                max_new_tokens=room,
                eos_token_id=sorted(stops),
                pad_token_id=tokenizer.pad_token_id,
                **({"do_sample": False, "num_beams": 1} | sampling),
            )
            # A decoder begins with a token of its own, and nothing stands before its text.
            begins = 1 if encoder.encoder_decoder else padded["input_ids"].shape[1]
            written = output[:, begins:].tolist()
            before = [[] if encoder.encoder_decoder else prompts[index] for index in batch]
            texts = texts_behind(tokenizer, before, written)
            for index, text, tokens in zip(batch, texts, written, strict=True):
                completions[index] = Completion(
                    text.rstrip("\n") if stop_at_newline else text, finished=not stops.isdisjoint(tokens)
                )
            if progress is not None:
                progress(len(completions), len(prompts))
    return [completions[index] for index in range(len(prompts))]


def check_positions(model: Any, encoder: RowEncoder, tokens: int) -> int | None:
    """The learned positions of a causal language model, None for another; an error where it has fewer than tokens."""
    positions = None if encoder.encoder_decoder else learned_positions(model)
    if positions is not None and tokens > positions:
        raise UserError(
            f"a text with its answer takes at least {tokens} positions, and the model has {positions}; give shorter "
            "texts, or a model that reads more."
        )
    return positions


def _batches(lengths: Sequence[int], size: int, most: int, positions: int | None) -> Iterator[tuple[list[int], int]]:
    """Prompts of about one length, the longest first, and the tokens that they may write."""

    def room(index: int) -> int:
        return most if positions is None else min(most, positions - lengths[index])

    # What a prompt may write does not depend on those beside it: so those that have less room than all are apart.
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for tokens, group in itertools.groupby(longest_first, key=room):
        alike = list(group)
        for first in range(0, len(alike), size):
            yield alike[first : first + size], tokens


def stops_of(encoder: RowEncoder, *, stop_at_newline: bool) -> set[int]:
    """The tokens that end a completion.

    Args:
        encoder: gives the tokenizer and the stop tokens.
        stop_at_newline: whether every token with a line break ends it, too.
    """
    return set(encoder.stop_token_ids) | (encoder.newline_token_ids if stop_at_newline else set())


@contextmanager
def evaluating(model: Any) -> Any:
    """Put a model in evaluation mode, and afterwards back in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def texts_behind(tokenizer: Any, prompts: Sequence[list[int]], written: Sequence[list[int]]) -> list[str]:
    """The texts of tokens as they stand behind prompts, without special tokens.

    By itself a text may lose its first space: some tokenizers take away the one that they put before any text. So it is
    decoded with the token before it, where that one is text of its own.
    """

    def decoded(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    before = decoded([prompt[-1:] for prompt in prompts])
    together = decoded([prompt[-1:] + tokens for prompt, tokens in zip(prompts, written, strict=True)])
    alone = decoded(list(written))
    return [
        whole.removeprefix(anchor) if anchor and whole.startswith(anchor) else text
        for anchor, whole, text in zip(before, together, alone, strict=True)
    ]
