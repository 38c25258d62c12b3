"""What a model with a head says of texts, and how good that is on texts whose labels are known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.faults import name_places
from diablo.data.labelled import encode_labelled
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.models.heads import Head
from diablo.scoring.generation import evaluating

Autocast = Callable[[], AbstractContextManager[Any]]

_HALF = 0.5
"""The probability from which on a text has a label, where it may have several."""


def features_of(row: EncodedRow) -> dict[str, Any]:
    """What :func:`label_batch` takes of a row."""
    types = {} if row.token_types is None else {"token_type_ids": row.token_types}
    return {**row.features, **types, **({} if row.target is None else {"target": row.target})}


def label_batch(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest.

    Args:
        features: what :func:`features_of` gives of each row.
        pad_token_id: what to pad with.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the rows have them, ``token_type_ids``, each ``(rows, tokens)`` of
        int64. ``labels`` is ``(rows,)`` where each row has a label (int64) or a number (fp32), ``(rows, labels)`` of
        fp32 where it has several labels, and ``(rows, tokens)`` of int64 where words have them.
    """
    made = collate(features, pad_token_id)
    batch = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
    if "token_type_ids" in features[0]:
        longest = batch["input_ids"].shape[1]
        types = [[*row["token_type_ids"], *[0] * (longest - len(row["token_type_ids"]))] for row in features]
        batch["token_type_ids"] = torch.tensor(types)
    if "target" in features[0]:
        batch["labels"] = torch.tensor([row["target"] for row in features])
    return batch


def summed_label_loss(logits: torch.Tensor, labels: torch.Tensor, head: Head) -> tuple[torch.Tensor, int]:
    """The loss of a batch, as a sum, and what it is a sum over: rows, or words.

    It is the cross-entropy of the right label, the mean over the labels of their binary cross-entropies where there may
    be several, or the squared error of a number.

    Args:
        logits: ``(rows, size)``, or ``(rows, tokens, size)`` where words are labelled.
        labels: as :func:`label_batch` makes them.
        head: the head.
    """
    logits = logits.float()
    if head.kind == "regression":
        return (logits.squeeze(-1) - labels.float()).square().sum(), len(labels)
    if head.several:
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1).sum(), len(labels)
    flat, targets = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(flat, targets, reduction="sum"), int((targets != IGNORED).sum())


@torch.no_grad()
def logits_of(
    model: Any,
    rows: Sequence[EncodedRow],
    pad_token_id: int,
    *,
    batch_size: int = 32,
    autocast: Autocast | None = None,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor], torch.Tensor]]:
    """A model's logits of rows, in batches of similar length.

    Args:
        model: the model.
        rows: the rows.
        pad_token_id: what to pad with.
        batch_size: rows of a forward.
        autocast: makes the context in which it computes; none where None.

    Yields:
        The indices of the rows, the batch on the device, and the logits in fp32.
    """
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    with evaluating(model):
        for first in range(0, len(by_length), batch_size):
            indices = by_length[first : first + batch_size]
            made = label_batch([features_of(rows[index]) for index in indices], pad_token_id)
            batch = {name: values.to(model.device) for name, values in made.items()}
            with nullcontext() if autocast is None else autocast():
                logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
            yield indices, batch, logits.float()


def label_figures(
    model: Any, rows: Sequence[EncodedRow], pad_token_id: int, head: Head, autocast: Autocast | None
) -> dict[str, float]:
    """How good a model is on labelled rows.

    Args:
        model: the model.
        rows: the rows.
        pad_token_id: what to pad with.
        head: the model's head.
        autocast: makes the context in which it computes.

    Returns:
        The mean ``loss``; of labels their ``accuracy`` (where a text may have several, the share of texts of which all
        are right) and ``macro_f1``; of numbers the ``pearson`` correlation and the ``rmse``.
    """
    total, count = 0.0, 0
    told: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for _, batch, logits in logits_of(model, rows, pad_token_id, autocast=autocast):
        loss, of = summed_label_loss(logits, batch["labels"], head)
        total, count = total + loss.item(), count + of
        labels = batch["labels"]
        if head.kind == "regression":
            told.append(logits.squeeze(-1).cpu())
            right.append(labels.float().cpu())
        elif head.several:
            told.append((logits.sigmoid() >= _HALF).cpu())
            right.append(labels.bool().cpu())
        else:
            known = labels != IGNORED
            told.append(F.one_hot(logits.argmax(-1)[known], head.size).bool().cpu())
            right.append(F.one_hot(labels[known], head.size).bool().cpu())
    guesses, truths = torch.cat(told), torch.cat(right)
    figures = {"loss": total / count}
    if head.kind == "regression":
        return {
            **figures,
            "pearson": pearson(guesses, truths),
            "rmse": (guesses - truths).square().mean().sqrt().item(),
        }
    accuracy = (guesses == truths).all(dim=1).float().mean().item()
    return {**figures, "accuracy": accuracy, "macro_f1": macro_f1(guesses, truths)}


def macro_f1(guesses: torch.Tensor, truths: torch.Tensor) -> float:
    """The mean over the labels of F1, of labels that are guessed or true at least once.

    Args:
        guesses: ``(texts, labels)`` of bool: which labels are guessed.
        truths: the same of those that are right.
    """
    hits, guessed, true = (each.sum(dim=0).double() for each in (guesses & truths, guesses, truths))
    occurs = (guessed + true) > 0
    return float((2 * hits[occurs] / (guessed + true)[occurs]).mean()) if bool(occurs.any()) else 0.0


def pearson(guesses: torch.Tensor, truths: torch.Tensor) -> float:
    """Pearson's correlation of two ``(numbers,)``; 0 where one of them does not vary."""
    one, other = (each.double() - each.double().mean() for each in (guesses, truths))
    scale = float(one.norm() * other.norm())
    return float((one * other).sum()) / scale if scale else 0.0


def ask(
    model: Any,
    encoder: RowEncoder,
    rows: Sequence[Row],
    head: Head,
    *,
    most: int | None,
    cut_at: int | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """What a model says of texts.

    Args:
        model: the model, on its device.
        encoder: texts to tokens.
        rows: the texts, without labels; completions where the head is a reward model's.
        head: the model's head.
        most: the most tokens that the model can read; None where it is not known.
        cut_at: the most tokens of a text, whose end is cut off, as in training; None where nothing is.
        batch_size: texts of a forward.

    Returns:
        For each text what :func:`answers_of` says; of words ``words``, each with its ``word``, or with None for a label
        where it is cut off.

    Raises:
        UserError: a text has more tokens than the model can read.
    """
    encoded = [
        encoder.encode(row) if head.kind == "reward" else encode_labelled(row, encoder.texts, (), cut_at)
        for row in rows
    ]
    if most is not None and (long := [row for row in encoded if row.length > most]):
        raise UserError(
            f"TEXT: {name_places(long)} of what was given has up to {max(row.length for row in long):,} tokens, and "
            f"the model reads {most:,}; shorten it."
        )
    answers: list[dict[str, Any]] = [{} for _ in rows]
    pad_token_id = encoder.tokenizer.pad_token_id
    for indices, _, logits in logits_of(model, encoded, pad_token_id, batch_size=batch_size):
        for index, own in zip(indices, logits, strict=True):
            if not rows[index].words:
                [answers[index]] = answers_of(own.unsqueeze(0), head)
                continue
            _, places = encoder.texts.encoded_words(rows[index].words, cut_at)
            said = answers_of(own, head)
            nothing: dict[str, Any] = {"label": None, "probability": None, "probabilities": {}}
            answers[index] = {
                "words": [
                    {"word": word, **(nothing if place is None else said[place])}
                    for word, place in zip(rows[index].words, places, strict=True)
                ]
            }
    return answers


def answers_of(logits: torch.Tensor, head: Head) -> list[dict[str, Any]]:
    """What a head says of texts, or of the tokens of one.

    Args:
        logits: ``(texts, size)``.
        head: the head.

    Returns:
        For each a ``label`` with its ``probability``, and the ``probabilities`` of all labels; ``labels`` where there
        may be several; or a ``score``.
    """
    if not head.labels:
        return [{"score": value} for value in logits.squeeze(-1).tolist()]
    shares = (logits.sigmoid() if head.several else logits.softmax(-1)).tolist()
    return [_answer(dict(zip(head.labels, each, strict=True)), head.several) for each in shares]


def _answer(shares: Mapping[str, float], several: bool) -> dict[str, Any]:
    if several:
        return {"labels": [label for label, share in shares.items() if share >= _HALF], "probabilities": dict(shares)}
    label = max(shares, key=shares.__getitem__)
    return {"label": label, "probability": shares[label], "probabilities": dict(shares)}


def say(answer: Mapping[str, Any]) -> str:
    """An answer in a line."""
    if "score" in answer:
        return f"{answer['score']:.4f}"
    shares = answer["probabilities"]
    labels: Iterable[str] = answer["labels"] if "labels" in answer else [answer["label"]]
    return ", ".join(f"{label} {shares[label]:.1%}" for label in labels) or "none of the labels"
