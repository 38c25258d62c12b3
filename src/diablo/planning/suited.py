"""Whether a recipe's settings suit its method and its model, as far as the model's config tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from transformers import PretrainedConfig

from diablo.data.faults import name_places
from diablo.data.rows import Row
from diablo.errors import UserError
from diablo.models.forms import ENCODER_DECODER, IMAGE_TEXT, check_form, form_of
from diablo.models.heads import Head
from diablo.models.loading import stored_quantization
from diablo.recipes.methods import AnyMethod, PeftMethod
from diablo.recipes.new_tokens import check_trains_tokens
from diablo.recipes.objectives import LabelObjective
from diablo.recipes.peft_methods import check_merges, check_packs, check_precision, check_sees
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


def is_encoder_decoder(recipe: Recipe, config: PretrainedConfig) -> bool:
    """Whether a model is an encoder-decoder, with a check that the recipe asks for nothing that such a model has not.

    Args:
        recipe: the recipe.
        config: the model's config, as it is stored.

    Raises:
        UserError: it is one, and the recipe asks for that.
    """
    check_form(config)
    if form_of(config) != ENCODER_DECODER:
        return False
    training, objective = recipe.training, recipe.objective.name
    refused = [
        ("objective", objective if objective != "sft" else None, "learns from prompts with completions alone; set sft"),
        ("training.packing", training.packing, "has no positions that would tell packed rows apart; leave it out"),
        (
            "training.neftune_noise_alpha",
            training.neftune_noise_alpha,
            "has an embedding for each of its two parts, which the noise does not reach; leave it out",
        ),
        (
            "new_tokens",
            recipe.new_tokens and ", ".join(token.text for token in recipe.new_tokens),
            "has embeddings that share their rows, which are not trained by themselves; leave it out",
        ),
        (
            "evaluation.general",
            recipe.evaluation.general,
            "goes on with no text, so that general text has no loss; leave it out",
        ),
    ]
    for key, found, reason in refused:
        if found:
            words = str(found).lower() if found is True else found
            raise UserError(f"{key}: found {words}, and {recipe.model!r} is an encoder-decoder, which {reason}.")
    return True


def check_images(recipe: Recipe, config: PretrainedConfig, rows: Sequence[Row]) -> bool:
    """Check that images can be trained on as a recipe says, and say whether there are any.

    Raises:
        UserError: they cannot be.
    """
    seeing = [row for row in rows if row.images]
    if not seeing:
        return False
    where = f"and {len(seeing)} of {len(rows)} rows have images ({name_places(seeing[:1])})"
    if form_of(config) is not IMAGE_TEXT:
        raise UserError(
            f"model: found {recipe.model!r}, which sees none, {where}; take a model that sees images, or rows without."
        )
    if not recipe.chat:
        raise UserError(f"chat: found false, {where}, whose places a chat template writes; set chat to true.")
    without = "leave it out, or take rows without images"
    if recipe.training.packing:
        raise UserError(f"training.packing: found true, {where}, which are not packed; {without}.")
    for switch in ("liger", "compile"):
        if getattr(recipe.speed, switch):
            raise UserError(f"speed.{switch}: found true, {where}, with which it has never run; {without}.")
    if isinstance(recipe.method, PeftMethod):
        check_sees(recipe.method.type)
    return True


def choose_head(needed: Head | None, config: PretrainedConfig, recipe: Recipe) -> tuple[Head | None, bool]:
    """The head that is trained, and whether the model has it already. Of the same labels, the model's order is taken.

    Args:
        needed: the head that the rows need; None where a language model is trained.
        config: the model's config, as it is stored.
        recipe: the recipe.

    Raises:
        UserError: a language model is to be trained, and the model has a head that writes nothing.
    """
    own = Head.of(config)
    if needed is None:
        if own is not None:
            raise UserError(
                f"model: {recipe.model!r} has a head that labels or scores texts and none that writes; set objective "
                f"to {own.kind}, or give a language model."
            )
        return None, False
    is_chosen = isinstance(recipe.objective, LabelObjective) and recipe.objective.labels is not None
    if own is not None and sorted(own.labels) == sorted(needed.labels) and not is_chosen and recipe.adapter is None:
        needed = replace(needed, labels=own.labels)
    return needed, needed.is_as(own)


def check_output_layer(recipe: Recipe, adapted: Any) -> None:
    """Check that nothing of the output layer is trained where TRL's losses take its weight itself, and pass that by.

    Raises:
        UserError: it is.
    """
    if recipe.objective.name == "sft" or recipe.objective.head is not None:
        return
    head = adapted.get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper):
        raise UserError(
            f"objective: found {recipe.objective.name}, which is not computed with trained rows of an output layer, "
            "such as those of new_tokens; train them in a supervised run, merge it, and start from the merged model."
        )
    if isinstance(head, BaseTunerLayer):
        raise UserError(
            f"method.target_modules: the output layer is among them, and objective {recipe.objective.name} is not "
            "computed with an adapted one; leave it out."
        )


def check_handover(recipe: Recipe, config: PretrainedConfig, adapted: Any, device: torch.device) -> None:
    """Check that an engine which generates can be given the trained weights.

    Args:
        recipe: the recipe.
        config: the model's config.
        adapted: the adapted model.
        device: where the model is trained.

    Raises:
        UserError: it cannot.
    """
    vllm = recipe.objective.vllm if recipe.objective.name == "grpo" else None
    if vllm is None:
        return
    if vllm.server and device.type != "cuda":
        raise UserError(
            f"objective.vllm.server: weights go from GPU to GPU, and the model is trained on {device.type}; leave "
            "objective.vllm out, and transformers generates."
        )
    if how := recipe.quantization or stored_quantization(config).get("quant_method"):
        raise UserError(
            f"objective.vllm: {how} quantizes the weights, into which an adapter cannot be merged for each step; leave "
            "objective.vllm out, and transformers generates."
        )
    if isinstance(recipe.method, PeftMethod):
        check_merges(recipe.method.type, "objective.vllm: found a section")
    if not isinstance(adapted, PeftModel):
        return
    handed = {
        id(parameter)
        for layer in adapted.modules()
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear)
        for parameter in layer.parameters()
    }
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and id(parameter) not in handed:
            raise UserError(
                f"objective.vllm: {name} is trained, and vLLM is handed the weights of linear layers alone; leave it "
                "out, and transformers generates."
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
