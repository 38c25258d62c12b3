"""Vectors of texts: made by a model, compared by a loss, and how well they find what belongs together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from diablo.data.encoding import EncodedRow
from diablo.models.heads import said
from diablo.models.vectors import Vectors, is_decoder
from diablo.scoring.generation import evaluating
from diablo.scoring.labels import features_of, label_batch, pearson

Autocast = Callable[[], AbstractContextManager[Any]]
Loss = Callable[[Sequence[torch.Tensor], torch.Tensor | None], torch.Tensor]
"""The loss of a batch: of the vectors of each column, ``(rows, size)`` of fp32, and the rows' numbers, ``(rows,)``."""
_NEAREST = 10


def make_loss(name: str, *, scale: float | None, margin: float | None, sizes: Sequence[int] | None) -> Loss:
    """A loss of sentence-transformers, on vectors that are there.

    Args:
        name: its name in a recipe.
        scale: what similarities are multiplied by; the library's own where None.
        margin: how far apart texts are to be; the library's own where None.
        sizes: the sizes of the parts of a vector that are trained as vectors, each with its whole loss; None where the
            whole alone is.
    """
    from sentence_transformers.sentence_transformer import losses as library

    # They are asked for their loss of vectors alone, and so have no model.
    losses: Any = library
    scaled = {} if scale is None else {"scale": scale}
    made: dict[str, Callable[[], Any]] = {
        "multiple_negatives": lambda: losses.MultipleNegativesRankingLoss(None, **scaled),
        "cosent": lambda: losses.CoSENTLoss(None, **scaled),
        "cosine": lambda: losses.CosineSimilarityLoss(None),
        "triplet": lambda: losses.TripletLoss(None, **({} if margin is None else {"triplet_margin": margin})),
        "contrastive": lambda: losses.ContrastiveLoss(None, **({} if margin is None else {"margin": margin})),
    }
    compute = made[name]().compute_loss_from_embeddings
    return compute if sizes is None else partial(_of_each_size, compute, sizes)


def _of_each_size(
    compute: Loss, sizes: Sequence[int], columns: Sequence[torch.Tensor], labels: torch.Tensor | None
) -> torch.Tensor:
    losses = [compute([F.normalize(each[:, :size], dim=-1) for each in columns], labels) for size in sizes]
    return torch.stack(losses).sum()


def embed(model: Any, vectors: Vectors, batch: dict[str, torch.Tensor], autocast: Autocast | None = None) -> Any:
    """The vectors of a batch of texts.

    Args:
        model: the model, without a head.
        vectors: how the vectors of its tokens become one.
        batch: ``input_ids``, ``attention_mask`` and maybe ``token_type_ids``, each ``(texts, tokens)`` of int64, on the
            model's device.
        autocast: makes the context in which the model computes; none where None.

    Returns:
        ``(texts, size)`` of fp32.
    """
    options = {"use_cache": False} if is_decoder(model.config) else {}
    with nullcontext() if autocast is None else autocast():
        tokens = said(model(**batch, **options))
    return vectors.of_tokens(tokens.float(), batch["attention_mask"])


def text_batch(rows: Sequence[EncodedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Texts, padded on the right to the longest, as :func:`embed` takes them; on the CPU."""
    made = label_batch([features_of(replace(row, target=None)) for row in rows], pad_token_id)
    return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in made}


@torch.no_grad()
def vectors_of(
    model: Any,
    vectors: Vectors,
    rows: Sequence[EncodedRow],
    pad_token_id: int,
    *,
    batch_size: int = 32,
    autocast: Autocast | None = None,
) -> torch.Tensor:
    """The vectors of texts, made in batches of similar length.

    Args:
        model: the model, on its device.
        vectors: how texts become vectors.
        rows: the texts.
        pad_token_id: what to pad with.
        batch_size: texts of a forward.
        autocast: makes the context in which the model computes.

    Returns:
        ``(texts, size)`` of fp32, on the CPU, in the order of the texts.
    """
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
    found = torch.empty(len(rows), vectors.size)
    with evaluating(model):
        for first in range(0, len(by_length), batch_size):
            indices = by_length[first : first + batch_size]
            made = text_batch([rows[index] for index in indices], pad_token_id)
            batch = {name: values.to(model.device) for name, values in made.items()}
            found[indices] = embed(model, vectors, batch, autocast).cpu()
    return found


def vector_figures(
    model: Any,
    vectors: Vectors,
    rows: Sequence[EncodedRow],
    pad_token_id: int,
    loss: Loss,
    batch_size: int,
    autocast: Autocast | None = None,
) -> dict[str, float]:
    """How good a model's vectors are on rows of texts that are compared.

    Args:
        model: the model.
        vectors: how texts become vectors.
        rows: the rows.
        pad_token_id: what to pad with.
        loss: the loss.
        batch_size: rows of a batch of the loss, which are taken in their order.
        autocast: makes the context in which the model computes.

    Returns:
        The mean ``loss`` of a row; of scored rows the ``spearman`` and ``pearson`` correlations of the cosines with the
        scores; of others what :func:`retrieval` says.
    """
    width = len(rows[0].sequences)
    flat = [text for row in rows for text in row.sequences]
    made = vectors_of(model, vectors, flat, pad_token_id, autocast=autocast)
    columns = [made[column::width] for column in range(width)]
    targets = targets_of(rows)
    total = 0.0
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        of_batch = loss([each[part] for each in columns], None if targets is None else targets[part])
        total += of_batch.item() * len(columns[0][part])
    figures = {"loss": total / len(rows)}
    if targets is not None:
        cosines = F.cosine_similarity(columns[0], columns[1])
        spearman = pearson(_ranks(cosines), _ranks(targets))
        return {**figures, "spearman": spearman, "pearson": pearson(cosines, targets)}
    return {**figures, **retrieval(rows, made)}


def targets_of(rows: Sequence[EncodedRow]) -> torch.Tensor | None:
    """The numbers of scored rows, ``(rows,)`` of fp32; None of others."""
    return None if rows[0].target is None else torch.tensor([row.target for row in rows])


def retrieval(rows: Sequence[EncodedRow], made: torch.Tensor) -> dict[str, float]:
    """How well the vectors of anchors find their positives among all positives and negatives of some rows.

    A text that stands in several rows counts once, and an anchor that stands in several has several right answers.

    Args:
        rows: the rows.
        made: the vectors of all their texts, row by row, ``(texts, size)``.

    Returns:
        ``accuracy_at_1``, the share of anchors whose nearest text is a right answer; ``mrr_at_10``, the mean of one
        over the place of the first right answer, and ``ndcg_at_10``, both of the ten nearest.
    """
    places: dict[tuple[int, ...], int] = {}
    right: dict[tuple[int, ...], set[int]] = {}
    anchors: dict[tuple[int, ...], int] = {}
    chosen: list[int] = []
    index = 0
    for row in rows:
        anchor = tuple(row.input_ids)
        anchors.setdefault(anchor, index)
        for offset, text in enumerate(row.others, start=1):
            key = tuple(text.input_ids)
            if key not in places:
                places[key] = len(places)
                chosen.append(index + offset)
            if offset == 1:
                right.setdefault(anchor, set()).add(places[key])
        index += len(row.sequences)
    queries, corpus = (F.normalize(made[indices], dim=-1) for indices in (list(anchors.values()), chosen))
    nearest = [similar.topk(min(_NEAREST, len(chosen))).indices for similar in (queries @ corpus.T).split(1024)]
    hits = torch.zeros(len(anchors), min(_NEAREST, len(chosen)))
    for number, (anchor, found) in enumerate(zip(anchors, torch.cat(nearest).tolist(), strict=True)):
        hits[number] = torch.tensor([float(place in right[anchor]) for place in found])
    ranks = torch.arange(1, hits.shape[1] + 1)
    gains = 1 / torch.log2(ranks + 1.0)
    best = torch.stack([gains[: len(right[anchor])].sum() for anchor in anchors])
    return {
        "accuracy_at_1": hits[:, 0].mean().item(),
        "mrr_at_10": (hits / ranks).amax(dim=1).mean().item(),
        "ndcg_at_10": ((hits * gains).sum(dim=1) / best).mean().item(),
    }


def cosines(one: torch.Tensor, others: torch.Tensor) -> list[float]:
    """How near a vector, ``(1, size)``, is to others, ``(texts, size)``: their cosines."""
    return F.cosine_similarity(one, others).tolist()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """The places of values in their order; equal ones have the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]
