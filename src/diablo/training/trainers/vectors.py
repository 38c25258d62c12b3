"""Embedding models: vectors of texts that belong together become near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diablo.data.encoding import EncodedRow
from diablo.models.vectors import Vectors
from diablo.planning.compared import loss_of
from diablo.planning.plan import Plan
from diablo.recipes.embedding import EmbeddingObjective
from diablo.records.progress import TokenMeter
from diablo.scoring.vectors import Loss, embed, make_loss, targets_of, text_batch, vector_figures
from diablo.training.trainers.base import number_of
from diablo.training.trainers.heads import OwnLossTrainer
from diablo.training.trainers.preferences import Columns


class TextCollator:
    """Makes batches of rows of texts, each column of texts a batch of its own, and counts their tokens.

    Args:
        plan: has the rows.
        meter: counts the tokens.
    """

    def __init__(self, plan: Plan, meter: TokenMeter) -> None:
        self.rows, self.pad_token_id, self.meter = plan.train, plan.encoder.tokenizer.pad_token_id, meter

    def __call__(self, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: ``columns``, a list with what :func:`diablo.scoring.vectors.text_batch` makes of each column.

        ``targets`` are the rows' numbers, where they have any, ``(rows,)`` of fp32; ``numbers`` are those of the rows
        in their files, and a list.
        """
        rows: list[EncodedRow] = [self.rows[each["index"]] for each in columns]
        batches = []
        for texts in zip(*(row.sequences for row in rows), strict=True):
            batch = text_batch(texts, self.pad_token_id)
            self.meter.count(sum(len(text.input_ids) for text in texts), batch["input_ids"].numel())
            batches.append(batch)
        return {"columns": batches, "targets": targets_of(rows), "numbers": [number_of(row) for row in rows]}


class VectorTrainer(OwnLossTrainer):
    """Trains a model to give near vectors to texts that belong together; see :class:`RunTrainer` for its arguments.

    The loss is that of sentence-transformers. The rows are the plan's, so that what is trained on is what was checked.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        objective = self.plan.recipe.objective
        assert isinstance(objective, EmbeddingObjective)
        name = loss_of(objective, scored=self.plan.is_scored)
        self.loss: Loss = make_loss(
            name, scale=objective.scale, margin=objective.margin, sizes=objective.matryoshka_dims
        )

    @property
    def vectors(self) -> Vectors:
        """How texts become vectors."""
        vectors = self.plan.vectors
        assert vectors is not None  # the objective has some
        return vectors

    @staticmethod
    def columns(plan: Plan) -> Columns:
        """What the collator takes of each training row: where it stands in the plan."""
        return [{"index": index} for index in range(len(plan.train))]

    @staticmethod
    def collator(plan: Plan, meter: TokenMeter) -> TextCollator:
        """Makes batches, and counts their tokens."""
        return TextCollator(plan, meter)

    def held_out_figures(self) -> dict[str, float]:
        """The loss of held-out rows, and how well the vectors of their texts find each other."""
        plan = self.plan
        return vector_figures(
            self.model,
            self.vectors,
            plan.held_out,
            plan.encoder.tokenizer.pad_token_id,
            self.loss,
            plan.recipe.training.batch_size,
            self.autocast,
        )

    def autocast(self) -> Any:
        """The context in which the model computes; vectors are made, and compared, in fp32."""
        return super().compute_loss_context_manager()

    def compute_loss_context_manager(self) -> Any:
        """The context of the whole loss, which is none: see :meth:`autocast`."""
        return torch.autocast(self.plan.device.type, enabled=False)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; the step's is the mean over its batches."""
        bare = self.accelerator.unwrap_model(model)

        def loss_of_batch() -> torch.Tensor:
            columns = [embed(model, self.vectors, batch, self.autocast) for batch in inputs["columns"]]
            return self.loss(columns, inputs["targets"])

        loss = loss_of_batch() / self.current_gradient_accumulation_steps
        return self.finite.check(bare, loss, self.state.global_step + 1, inputs["numbers"], loss_of_batch)
