"""Texts that are compared: which loss a recipe's rows take, and the order of training in which none stands twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diablo.data.encoding import EncodedRow
from diablo.data.faults import name_places
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.planning.rows import Rows
from diablo.recipes.embedding import OF_ANCHORS, EmbeddingLoss, EmbeddingObjective
from diablo.recipes.recipe import Recipe

if TYPE_CHECKING:
    from diablo.data.batching import DistinctSampler
    from diablo.models.vectors import Vectors


def loss_of(objective: EmbeddingObjective, *, scored: bool) -> EmbeddingLoss:
    """The loss of a recipe: its own, or that which its rows take.

    Args:
        objective: the objective.
        scored: whether the rows are two texts with a number.
    """
    return objective.loss or ("cosent" if scored else "multiple_negatives")


def check_compared(recipe: Recipe, rows: Rows) -> None:
    """Check that rows are all of one form, and that the loss is one of such rows.

    Raises:
        UserError: they are not.
    """
    objective = recipe.objective
    assert isinstance(objective, EmbeddingObjective)
    every = [*rows.train, *rows.held_out]
    forms = Counter(_form(row) for row in every)
    if len(forms) > 1:
        rare = min(forms, key=lambda form: forms[form])
        found = [row for row in every if _form(row) == rare]
        others = " and ".join(form for form in forms if form != rare)
        raise UserError(
            f"data: {len(found)} rows have {rare} ({name_places(found)}), and the others have {others}; a loss takes "
            "rows of one form: give them as many texts each, or train on them in another run."
        )
    scored = every[0].label is not None
    loss, form, negatives = loss_of(objective, scored=scored), _form(every[0]), len(every[0].others) - 1
    takes = "anchor and positive" if loss in OF_ANCHORS else "sentence1, sentence2 and a number"
    if scored == (loss in OF_ANCHORS):
        raise UserError(
            f"objective.loss: found {loss}, which takes rows of {takes}, and these have {form}; leave it out, or give "
            "other rows."
        )
    if loss == "triplet" and negatives != 1:
        raise UserError(
            f"objective.loss: found triplet, which takes one negative, and the rows have {form}; take "
            "multiple_negatives, or give other rows."
        )
    prompts = {"query_prompt": objective.query_prompt, "document_prompt": objective.document_prompt}
    if scored and (given := [key for key, text in prompts.items() if text is not None]):
        raise UserError(
            f"objective.{given[0]}: found {prompts[given[0]]!r}, and of {form} neither text is a query; leave it out."
        )
    if loss == "cosine" and (far := [row for row in every if not -1 <= _number(row) <= 1]):
        raise UserError(
            f"data: {len(far)} rows have a score outside of -1 to 1 ({name_places(far)}), and loss cosine takes it for "
            "a cosine; divide the scores, or take cosent, which reads their order alone."
        )
    if loss == "contrastive" and (other := [row for row in every if _number(row) not in (0, 1)]):
        raise UserError(
            f"data: {len(other)} rows have a label that is neither 1 nor 0 ({name_places(other)}), which loss "
            "contrastive takes for near and far; give these, or take cosent."
        )
    alone = recipe.training.batch_size == 1
    if alone and ((loss == "multiple_negatives" and not negatives) or loss == "cosent"):
        raise UserError(
            f"training.batch_size: found 1, and {loss} compares the rows of a batch; take more: 32 or as many as the "
            "memory holds."
        )


def prompts_of(vectors: Vectors, rows: Sequence[Row]) -> tuple[str, str]:
    """What is put before the first text of rows, and before each of the others."""
    if rows and rows[0].label is not None:
        return vectors.prompt(None), vectors.prompt(None)
    return vectors.prompt("query"), vectors.prompt("document")


def check_sizes(objective: EmbeddingObjective, vectors: Vectors) -> None:
    """Check that a model's vectors are as long as the objective takes parts of them.

    Raises:
        UserError: one is not.
    """
    sizes = objective.matryoshka_dims or [vectors.size]
    if max(sizes) != vectors.size:
        what = "more than" if max(sizes) > vectors.size else "fewer than all of"
        raise UserError(
            f"objective.matryoshka_dims: found {max(sizes)} as the largest, which is {what} the {vectors.size} numbers "
            f"of the model's vectors; let the largest be {vectors.size}."
        )


def distinct_sampler(recipe: Recipe, rows: Sequence[EncodedRow], batch: int) -> DistinctSampler:
    """The order of training for a loss that takes the other rows of a forward for wrong answers.

    Args:
        recipe: the recipe.
        rows: the training rows.
        batch: rows of an optimizer step.

    Raises:
        UserError: some text stands in so many rows that batches cannot be without two of them.
    """
    from diablo.data.batching import DistinctSampler

    training = recipe.training
    texts = [frozenset(tuple(each.input_ids) for each in row.sequences) for row in rows]
    sampler = DistinctSampler([row.length for row in rows], batch, recipe.seed, texts, training.batch_size)
    epochs = math.ceil(training.max_steps / sampler.steps if training.max_steps else training.epochs)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        if doubles := sampler.doubles():
            counts = Counter(text for own in texts for text in own)
            _, count = counts.most_common(1)[0]
            found = [rows[index] for index in doubles]
            raise UserError(
                f"training.batch_size: found {training.batch_size}, and multiple_negatives takes the other rows of a "
                f"batch for wrong answers, but {len(found)} rows have a text of another row of theirs "
                f"({name_places(found)}): one text stands in {count} of {len(rows)} rows; lower the batch size, or "
                "leave rows out."
            )
    sampler.set_epoch(0)
    return sampler


def _form(row: Row) -> str:
    if row.label is not None:
        return "two texts and a score"
    negatives = len(row.others) - 1
    return f"anchor, positive and {negatives or 'no'} negative{'s' * (negatives != 1)}"


def _number(row: Row) -> float:
    assert isinstance(row.label, float)
    return row.label
