"""Whether a recipe's settings suit its method and its model, as far as the model's config tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from diablo.errors import UserError
from diablo.models.loading import stored_quantization
from diablo.recipes.methods import AnyMethod, PeftMethod
from diablo.recipes.new_tokens import check_trains_tokens
from diablo.recipes.peft_methods import check_packs, check_precision
from diablo.recipes.recipe import Recipe


def check_suited(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype, methods: Sequence[AnyMethod]) -> None:
    """Check that methods can train as a recipe says otherwise: in a dtype, on packed rows, over quantized weights.

    Raises:
        UserError: one cannot.
    """
    if recipe.new_tokens is not None:
        check_trains_tokens(methods)
    for kind in (method.type for method in methods if isinstance(method, PeftMethod)):
        check_precision(kind, dtype)
        if recipe.training.packing:
            check_packs(kind)
    how = recipe.quantization or stored_quantization(config).get("quant_method")
    if how and recipe.merge:
        raise UserError(
            f"merge: found true, where {how} quantizes the weights; leave it out, and merge with diablo merge --into."
        )
    refused = [method.title for method in methods if method.needs_plain_weights]
    if how and refused:
        raise UserError(
            f"method: {', '.join(refused)} would have to read or change weights that {how} quantizes; take another "
            "method, or a model that is not quantized."
        )


def check_smoothing(recipe: Recipe, config: PretrainedConfig) -> None:
    """Labels are smoothed in our own loss, which is not that of a mixture whose router is balanced.

    Raises:
        UserError: the model is one, and the recipe smooths labels.
    """
    text = config.get_text_config()
    is_balanced = hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", 0.0) != 0.0
    if recipe.training.label_smoothing and is_balanced:
        raise UserError(
            f"training.label_smoothing: found {recipe.training.label_smoothing:g} with a mixture whose router has a "
            "balancing loss, beside which labels are not smoothed; leave it out, or set router_aux_loss_coef to 0 in "
            "the model's config."
        )
