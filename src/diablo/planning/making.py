"""A recipe resolved and checked into a plan, from the config, the tokenizer and the data alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig

from diablo.data.batching import LengthGroupedSampler
from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.general_text import encode_general_text
from diablo.data.packing import pack
from diablo.data.vision import ImageProcessor
from diablo.devices import choose_device, choose_dtype
from diablo.errors import UserError
from diablo.models.adapters import check_tensors
from diablo.models.folders import adapter_folder
from diablo.models.heads import Head, gives_vectors
from diablo.models.loading import (
    count_parameters,
    learned_positions,
    load_config,
    load_generation_config,
    load_processor,
    longest_text,
    meta_model,
    resolve_model,
    stop_token_ids,
)
from diablo.models.saving import shapes_in_file
from diablo.models.vectors import Vectors, load_vectors
from diablo.models.vocabulary import TrainedTokens, config_with_rows
from diablo.planning import preflight
from diablo.planning.compared import check_sizes, distinct_sampler, loss_of, prompts_of
from diablo.planning.materials import Materials, gather
from diablo.planning.optimizers import choose_optimizer, group_members
from diablo.planning.plan import Plan
from diablo.planning.rewards import check_groups, make_sampler
from diablo.planning.rows import encode_rows, measured_rows
from diablo.planning.schedules import choose_schedule
from diablo.planning.speed import check_speed
from diablo.planning.suited import (
    check_handover,
    check_images,
    check_output_layer,
    check_smoothing,
    check_suited,
    choose_head,
    is_encoder_decoder,
)
from diablo.planning.tokens import tokens_of_recipe
from diablo.recipes.applying import TargetKind, apply_on_meta, kinds_by_layer, target_kinds
from diablo.recipes.embedding import EmbeddingObjective
from diablo.recipes.methods import AnyMethod, FullMethod, PeftMethod
from diablo.recipes.peft_methods import check_merges
from diablo.recipes.recipe import Recipe


def make_plan(recipe: Recipe, *, materials: Materials | None = None, replicas: int | None = None) -> Plan:
    """Resolve and check a recipe. Config, tokenizer and data are read; the model is built on the meta device.

    Args:
        recipe: the recipe.
        materials: what :func:`diablo.planning.materials.gather` has read for it; read here where None.
        replicas: processes of which each takes ``batch_size`` rows of its own; all that were launched where None.

    Raises:
        UserError: something does not fit; the message names the key of the recipe.
    """
    replicas = replicas or int(os.environ.get("WORLD_SIZE", "1"))
    materials = materials or gather(recipe)
    rows = materials.rows
    device = choose_device()
    dtype = choose_dtype(recipe.precision, device)
    preflight.check_trackers(recipe.tracking.report_to)
    optimizer = choose_optimizer(recipe.training, device)
    model_name = resolve_model(recipe.model)
    config = load_config(model_name)
    encoder_decoder = is_encoder_decoder(recipe, config)
    tokenizer, tokens = tokens_of_recipe(recipe, model_name, config)
    config = config_with_rows(config, tokens)
    head, has_own_head = choose_head(materials.head, config, recipe)
    if head is not None:
        head.put_into(config, tokenizer.pad_token_id)
    check_suited(recipe, config, dtype, [recipe.method])
    if isinstance(recipe.method, PeftMethod) and recipe.merge:
        check_merges(recipe.method.type, "merge: found true")
    check_smoothing(recipe, config)
    with_images = check_images(recipe, config, [*rows.train, *rows.held_out])
    images = ImageProcessor(load_processor(model_name, tokenizer)) if with_images else None
    adapted, targets, parameters = _adapted_on_meta(recipe.method, config, tokens)
    _check_adapted(recipe, model_name, config, adapted, device, dtype)
    special_text = recipe.data.special_text
    encoder = RowEncoder(
        tokenizer,
        chat=recipe.chat,
        special_text=special_text,
        stop_token_ids=stop_token_ids(config, load_generation_config(model_name)),
        has_completions=recipe.objective.rows not in ("labelled", "numbered", "tagged", "texts"),
        images=images,
        encoder_decoder=encoder_decoder,
    )
    faults = list(rows.faults)
    vectors = _vectors_of(recipe, model_name, config, tokenizer, replicas)
    most = vectors.most if vectors is not None else _most_tokens(encoder, config, head, adapted)
    prompts = ("", "") if vectors is None else prompts_of(vectors, rows.train)
    train, too_long = encode_rows(recipe, encoder, rows.train, "training", faults, head, most, prompts)
    held_out, _ = encode_rows(recipe, encoder, measured_rows(recipe, rows), "held-out", faults, head, most, prompts)
    if head is None and recipe.objective.rows != "prompts":
        preflight.check_supervision(train, "training")
        preflight.check_supervision(held_out, "held-out")
    training, general = recipe.training, recipe.evaluation.general
    whole = min(training.max_length, most or training.max_length)
    if training.on_nonfinite == "skip" and replicas > 1:
        raise UserError(
            f"training.on_nonfinite: found skip with {replicas} processes, which would leave out different steps; set "
            "stop, or train in one process."
        )
    if recipe.objective.rows == "prompts":
        check_groups(recipe, replicas)
    sequences, sampler = _order(recipe, train, replicas)
    steps = training.max_steps or math.ceil(training.epochs * sampler.steps)
    return Plan(
        recipe=recipe,
        model_name=model_name,
        config=config,
        encoder=encoder,
        trained_tokens=tokens,
        scored=materials.scored,
        validated=materials.validated,
        validation_problems=rows.validation_problems,
        sources=rows.sources,
        held_out_sources=rows.held_out_sources,
        train=train,
        held_out=held_out,
        faults=faults,
        too_long=too_long,
        tested=rows.tested,
        near_copies=rows.near_copies,
        validation=rows.validation,
        general=encode_general_text(general, encoder.tokenizer, whole, special_text) if general else [],
        targets=targets,
        parameters=parameters,
        sequences=sequences,
        sampler=sampler,
        steps=steps,
        optimizer=optimizer,
        schedule=choose_schedule(training, steps),
        device=device,
        dtype=dtype,
        rewards=materials.rewards,
        head=head,
        has_own_head=has_own_head,
        vectors=vectors,
    )


def _check_adapted(
    recipe: Recipe, model_name: str, config: PretrainedConfig, adapted: Any, device: torch.device, dtype: torch.dtype
) -> None:
    """Check what needs the adapted model, on the meta device."""
    if recipe.adapter is not None and isinstance(adapted, PeftModel):
        check_tensors(adapter_folder(recipe.adapter), model_name, shapes_in_file(adapted))
    check_output_layer(recipe, adapted)
    check_handover(recipe, config, adapted, device)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    group_members(trained, recipe.training.optimizer.groups)
    check_speed(recipe, config, adapted, device, dtype)


def _vectors_of(
    recipe: Recipe, model_name: str, config: PretrainedConfig, tokenizer: Any, replicas: int
) -> Vectors | None:
    """How texts become vectors, as the model or the adapter that is gone on from says; None where they do not."""
    objective = recipe.objective
    if not isinstance(objective, EmbeddingObjective):
        return None
    if replicas > 1:
        raise UserError(
            f"objective: found embedding in {replicas} processes, of which each would compare the texts of its own "
            "batch alone; train in one process."
        )
    adapter = None if recipe.adapter is None else adapter_folder(recipe.adapter)
    source = adapter if adapter is not None and gives_vectors(adapter) else model_name
    vectors = load_vectors(source, config, tokenizer)
    vectors = vectors.told(objective.query_prompt, objective.document_prompt, recipe.training.max_length)
    check_sizes(objective, vectors)
    return vectors


def _most_tokens(encoder: RowEncoder, config: PretrainedConfig, head: Head | None, model: Any) -> int | None:
    """The most tokens that a model, or a part of an encoder-decoder, takes; None where it is not known.

    A causal language model without learned positions takes more than its config says.
    """
    if encoder.encoder_decoder:
        # Those of BART's kin have learned positions; T5 has none, and reads more than its tokenizer says.
        return getattr(config, "max_position_embeddings", None)
    return learned_positions(model) if head is None else longest_text(encoder.tokenizer, config)


def _order(recipe: Recipe, train: Sequence[EncodedRow], replicas: int) -> tuple[list[list[int]], LengthGroupedSampler]:
    """The rows of each sequence, and the order in which sequences are trained on."""
    training = recipe.training
    batch = training.batch_size * training.gradient_accumulation * replicas
    lengths = [row.length for row in train]
    sequences = (
        pack(lengths, training.max_length, recipe.seed) if training.packing else [[i] for i in range(len(train))]
    )
    if isinstance(recipe.objective, EmbeddingObjective) and _has_wrong_answers(recipe.objective, train):
        return sequences, distinct_sampler(recipe, train, batch)
    return sequences, make_sampler(recipe, [sum(lengths[index] for index in rows) for rows in sequences], batch)


def _has_wrong_answers(objective: EmbeddingObjective, rows: Sequence[EncodedRow]) -> bool:
    """Whether the loss takes the texts of other rows for wrong answers."""
    return loss_of(objective, scored=rows[0].target is not None) == "multiple_negatives"


def adapt_on_meta(method: AnyMethod, config: PretrainedConfig) -> tuple[list[TargetKind], tuple[int, int]]:
    """What a method adapts, by kind, and the trainable and all parameters, from a model's config alone.

    Raises:
        UserError: the method does not fit the model.
    """
    return _adapted_on_meta(method, config)[1:]


def adapt_layers(method: PeftMethod, config: PretrainedConfig) -> tuple[Any, list[TargetKind], tuple[int, int]]:
    """The same for a method whose adapters are made from the values of weights, with a model that stands in for it."""
    model = meta_model(config)
    total = count_parameters(model)[1]
    stand_in, kinds = kinds_by_layer(method, model)
    trained = sum(kind.parameters for kind in kinds)
    return stand_in, kinds, (trained, total + trained)


def _adapted_on_meta(
    method: AnyMethod, config: PretrainedConfig, tokens: TrainedTokens | None = None
) -> tuple[Any, list[TargetKind], tuple[int, int]]:
    adapted = apply_on_meta(meta_model(config), method, tokens)
    if adapted is None:
        assert isinstance(method, PeftMethod)
        adapted, kinds, parameters = adapt_layers(method, config)
    else:
        kinds, parameters = target_kinds(adapted), count_parameters(adapted)
    chosen = not isinstance(method, FullMethod) and isinstance(method.target_modules, str)
    preflight.check_towers(adapted, chosen=chosen)
    return adapted, kinds, parameters
