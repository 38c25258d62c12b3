"""What all objectives of a recipe have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from diablo.data.rows import RowKind
from diablo.models.heads import HeadKind
from diablo.recipes.section import Section


class NamedObjective(Section):
    """What all objectives have in common."""

    name: str = Field(description="the name of an objective")

    rows: ClassVar[RowKind] = "completions"
    loss_unit: ClassVar[str] = "nats per token"
    """What the loss is counted in."""
    head: ClassVar[HeadKind | None] = None
    """What the model has in place of its output layer; None where it keeps that."""
    scores: ClassVar[tuple[str, ...]] = ()
    """The figures of held-out rows that say how good the model is, by their names, of which a run has one; none where
    the loss alone does."""
    rate_share: ClassVar[float] = 1.0
    """What suits it of the learning rate of supervised training: a tenth, where completions are judged and bad ones
    made less likely. Measured: "What a stage adds" in ``docs/objectives.md``."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the model with what it was before training."""
        return False

    def describe(self) -> str:
        """The objective and its settings, in a line."""
        told = {key: value for key, value in self.model_dump().items() if key not in ("name", "labels") and value}
        listed = [
            f"{key.replace('_', ' ')} {' and '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in told.items()
        ]
        return f"{self.name}: {', '.join(listed)}" if listed else self.name
