"""Models with a head: classifiers of texts and of words, regression, and reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainingArguments
from trl import RewardConfig, RewardTrainer

from diablo.models.heads import Head
from diablo.planning.plan import Plan
from diablo.records.progress import TokenMeter
from diablo.scoring.labels import features_of, label_batch, label_figures, summed_label_loss
from diablo.training.tracking import Tracked
from diablo.training.trainers.base import RunTrainer, number_of
from diablo.training.trainers.preferences import Columns, TrainerOfPairs


class TrackedArguments(Tracked, TrainingArguments):
    """transformers' arguments, with the recipe beside them."""


class TrackedRewardConfig(Tracked, RewardConfig):
    """TRL's arguments, with the recipe beside them."""


class HeadTrainer(RunTrainer):
    """What the trainers of models with a head have in common."""

    def compute_loss_context_manager(self) -> Any:
        """The context of a forward: the head is fp32 beside frozen weights that need not be."""
        plan = self.plan
        return torch.autocast(plan.device.type, dtype=plan.dtype, enabled=plan.dtype != torch.float32)


class LabelCollator:
    """Makes batches of labelled rows, and counts their tokens.

    Args:
        pad_token_id: fills rows up.
        meter: counts the tokens.
    """

    def __init__(self, pad_token_id: int, meter: TokenMeter) -> None:
        self.pad_token_id, self.meter = pad_token_id, meter

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch as :func:`diablo.scoring.labels.label_batch` makes it, and the ``numbers`` of the rows, a list."""
        batch: dict[str, Any] = {**label_batch(rows, self.pad_token_id)}
        self.meter.count(sum(len(row["input_ids"]) for row in rows), batch["input_ids"].numel())
        return {**batch, "numbers": [number for row in rows for number in row["numbers"]]}


class OwnLossTrainer(HeadTrainer):
    """What the trainers have in common whose loss is none of TRL's: they are transformers' Trainer alone."""

    config_class = TrackedArguments
    # The loss is scaled here, so that a step that is left out counts as what it is.
    loss_is_scaled_for_ga: Any = True

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone: none."""
        return {}


class LabelTrainer(OwnLossTrainer):
    """Trains a model to label texts or words, or to give a number; see :class:`RunTrainer` for its arguments."""

    @property
    def head(self) -> Head:
        """The model's head."""
        head = self.plan.head
        assert head is not None  # the objective has one
        return head

    @staticmethod
    def columns(plan: Plan) -> Columns:
        """What the collator takes of each training row."""
        return [{**features_of(row), "numbers": [number_of(row)]} for row in plan.train]

    @staticmethod
    def collator(plan: Plan, meter: TokenMeter) -> LabelCollator:
        """Makes batches, and counts their tokens."""
        return LabelCollator(plan.encoder.tokenizer.pad_token_id, meter)

    def held_out_figures(self) -> dict[str, float]:
        """The mean loss of held-out rows, and how many of them are right."""
        plan, model = self.plan, self.model
        autocast = self.compute_loss_context_manager
        return label_figures(model, plan.held_out, plan.encoder.tokenizer.pad_token_id, self.head, autocast)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the rows, or of their words, over all batches that make a step."""
        numbers, labels = inputs.pop("numbers"), inputs.pop("labels")
        bare = self.accelerator.unwrap_model(model)
        summed, count = summed_label_loss(model(**inputs).logits, labels, self.head)
        # No word of a batch may be labelled, where texts are cut.
        loss = summed / max(count, 1) / self.current_gradient_accumulation_steps
        return self.finite.check(bare, loss, self.state.global_step + 1, numbers, lambda: bare(**inputs))


class RewardModelTrainer(HeadTrainer, TrainerOfPairs, RewardTrainer):
    """Trains a model to score completions; see :class:`RunTrainer` for its arguments."""

    config_class = TrackedRewardConfig

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone."""
        objective: Any = plan.recipe.objective
        return {
            "center_rewards_coefficient": objective.center_rewards_coefficient,
            "max_length": None,
            # TRL would take off the method's dropout as well.
            "disable_dropout": False,
        }

    @staticmethod
    def figures_of(metrics: Mapping[str, float], batch: Mapping[str, Any]) -> list[tuple[str, float, int]]:
        """The share of pairs whose better completion has the higher score, and by how much it is higher."""
        pairs = len(batch["input_ids"]) // 2
        return [(name, metrics[name], pairs) for name in ("accuracy", "margin")]

    def _mean_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return super()._mean_loss(model, given)
