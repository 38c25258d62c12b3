"""The objective of models that give vectors of texts: its losses and their settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from diablo.data.rows import RowKind
from diablo.errors import UserError
from diablo.models.heads import HeadKind
from diablo.recipes.named_objective import NamedObjective
from diablo.recipes.section import explained

EmbeddingLoss = Literal["multiple_negatives", "triplet", "cosent", "cosine", "contrastive"]
OF_ANCHORS: tuple[EmbeddingLoss, ...] = ("multiple_negatives", "triplet")
"""The losses of rows with an anchor and a positive; the others are of rows with a score."""
_KEYS_OF_LOSSES: dict[str, tuple[EmbeddingLoss, ...]] = {
    "scale": ("multiple_negatives", "cosent"),
    "margin": ("triplet", "contrastive"),
}


class EmbeddingObjective(NamedObjective):
    """Embedding: texts that belong together get vectors that are near each other."""

    name: Literal["embedding"] = Field(description="embedding: texts that belong together get vectors that are near")
    loss: EmbeddingLoss | None = Field(
        None,
        description=f"one of {', '.join(EmbeddingLoss.__args__)}; "  # pyrefly: ignore[missing-attribute]
        "multiple_negatives or cosent, as the rows are, if not given",
    )
    scale: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a number above 0, of multiple_negatives and cosent: what similarities are multiplied by, one over "
        "the temperature; 20 if not given",
    )
    margin: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a number above 0: of triplet by how much the negative is to be farther, 5 if not given; of "
        "contrastive how far apart two texts are to be, 0.5 if not given",
    )
    matryoshka_dims: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, min_length=1, description="a list of sizes: the first so many numbers of a vector are a vector as well"
    )
    query_prompt: str | None = Field(
        None, description="a text that is put before each anchor; the model's own prompt, named query, if not given"
    )
    document_prompt: str | None = Field(
        None, description="a text that is put before each positive and negative; the model's own if not given"
    )

    rows: ClassVar[RowKind] = "texts"
    loss_unit: ClassVar[str] = "per batch"
    head: ClassVar[HeadKind | None] = "embedding"
    scores: ClassVar[tuple[str, ...]] = ("ndcg_at_10", "spearman")

    @model_validator(mode="after")
    @explained()
    def _fits(self) -> EmbeddingObjective:
        for key, losses in _KEYS_OF_LOSSES.items():
            found = getattr(self, key)
            if found is not None and (self.loss or "multiple_negatives") not in losses:
                raise UserError(
                    f"objective.{key}: found {found:g}, which is of loss {' and '.join(losses)}; set objective.loss to "
                    "one of them, or leave it out."
                )
        sizes = self.matryoshka_dims or []
        if len(set(sizes)) < len(sizes):
            raise UserError(f"objective.matryoshka_dims: found {', '.join(map(str, sizes))}; name each size once.")
        return self
