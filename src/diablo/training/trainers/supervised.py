"""Supervised fine-tuning: TRL's trainer, with the loss of the completions alone."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTConfig, SFTTrainer

from diablo.errors import UserError
from diablo.planning.plan import Plan
from diablo.records.progress import TokenMeter
from diablo.scoring.generation import held_out_loss
from diablo.scoring.losses import summed_completion_loss
from diablo.training.measuring import MeteredCollator
from diablo.training.tracking import Tracked
from diablo.training.trainers.base import RunTrainer, number_of


class TrackedSFTConfig(Tracked, SFTConfig):
    """TRL's arguments, with the recipe beside them."""


class CompletionTrainer(RunTrainer, SFTTrainer):
    """TRL's trainer of completions; see :class:`diablo.training.trainers.base.RunTrainer` for its arguments."""

    config_class = TrackedSFTConfig

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone."""
        return {
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }

    @staticmethod
    def columns(plan: Plan) -> list[dict[str, Any]]:
        """What the collator takes of each training sequence."""
        return [
            {
                **plan.features_of(sequence),
                "numbers": [number_of(row) for row in plan.rows_of(sequence)],
                "sequence": sequence,
            }
            for sequence in range(len(plan.sequences))
        ]

    @staticmethod
    def collator(plan: Plan, meter: TokenMeter) -> MeteredCollator:
        """Makes batches, and counts their tokens."""
        return MeteredCollator(plan, meter)

    def held_out_figures(self) -> dict[str, float]:
        """The mean loss of a held-out token, in nats."""
        plan = self.plan
        encoder = plan.encoder
        return {"loss": held_out_loss(self.model, plan.held_out, encoder.tokenizer.pad_token_id, images=encoder.images)}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the supervised tokens of the whole optimizer step.

        TRL's own, which waits for the device several times a step, is left to what ours does not do: the balancing loss
        of a mixture's router.
        """
        numbers = inputs.pop("numbers")
        # Without the wrapper of several processes, which would wait for the others.
        bare = self.accelerator.unwrap_model(model)
        if self.aux_loss_enabled or return_outputs:
            inputs = {name: values for name, values in inputs.items() if name != "predicting"}
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if return_outputs:
                return result
            return self.finite.check(bare, result, self.state.global_step + 1, numbers, lambda: bare(**inputs))
        count = len(inputs["predicting"]) if num_items_in_batch is None else num_items_in_batch
        smoothing = self.plan.recipe.training.label_smoothing
        loss = summed_completion_loss(model, inputs, label_smoothing=smoothing) / count
        loss = self.finite.check(
            bare, loss, self.state.global_step + 1, numbers, lambda: summed_completion_loss(bare, inputs)
        )
        # The count is that of all processes, and DDP averages the gradients over them.
        return loss * self.accelerator.num_processes if num_items_in_batch is not None else loss


@contextmanager
def adapted_head_allowed(model: Any) -> Generator[None]:
    """TRL refuses an adapted output layer, which its own losses pass by; the loss here is of the model's logits.

    Raises:
        UserError: the output layer is adapted, and the loss is TRL's own.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield
        return
    if getattr(model.config, "output_router_logits", False):
        raise UserError(
            "method.target_modules: the output layer is among them, and the balancing loss of this mixture's router is "
            "not computed with an adapted one: leave it out, or set output_router_logits to false in the model's "
            "config."
        )
    model.get_output_embeddings = head.get_base_layer
    try:
        yield
    finally:
        del model.get_output_embeddings
