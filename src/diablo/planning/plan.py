"""What a recipe will do, worked out from the config, the tokenizer and the data, before any weight is loaded."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from diablo.data.batching import LengthGroupedSampler
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.faults import Place, RowFault
from diablo.data.general_text import encode_general_text
from diablo.data.reading.sources import SourceRows
from diablo.devices import choose_device, choose_dtype
from diablo.errors import UserError
from diablo.models.loading import (
    count_parameters,
    load_config,
    load_generation_config,
    load_tokenizer,
    meta_model,
    resolve_model,
    stop_token_ids,
    stored_quantization,
)
from diablo.planning import preflight
from diablo.planning.optimizers import OptimizerChoice, choose_optimizer, group_members
from diablo.planning.rows import choose_rows, encode_rows
from diablo.planning.schedules import ScheduleChoice, choose_schedule
from diablo.planning.speed import check_speed
from diablo.recipes.applying import TargetKind, apply_method, kinds_by_layer, target_kinds
from diablo.recipes.methods import AnyMethod, FullMethod, PeftMethod
from diablo.recipes.peft_methods import check_merges, check_precision
from diablo.recipes.recipe import Recipe
from diablo.scoring.generation import Decoding, decoding_for
from diablo.scoring.likelihood import as_multiple_choice
from diablo.tasks import Task, get_task


@dataclass(frozen=True)
class Plan:
    """A recipe with everything resolved that can be without the model's weights.

    Attributes:
        recipe: the recipe.
        model_name: folder or hub id that transformers understands.
        config: the model's config.
        encoder: rows to tokens.
        scored: the tasks that are scored before and after, each with how its completions are generated; None where its
            choices are scored by likelihood.
        sources: what the training rows were read from; nothing where they are a task's.
        held_out_sources: the same of the held-out rows; nothing where they are cut out of the training rows.
        train: encoded training rows.
        held_out: encoded held-out rows; empty where there are none.
        faults: rows that were left out because they are malformed, or the chat template does not take them.
        too_long: where the rows stand that are left out because they exceed ``training.max_length``.
        tested: how many training rows were left out because their prompt is one that is tested on.
        validation: how many rows were kept out of training for validation.
        general: encoded general text, whose loss is measured before and after training; empty where there is none.
        targets: what the method adapts, by kind.
        parameters: trainable and all parameters.
        sampler: the order of training.
        steps: optimizer steps of the run, where held-out losses do not end it before.
        optimizer: the optimizer.
        schedule: the schedule of its learning rate.
        device: where it runs.
        dtype: dtype of the frozen weights.
    """

    recipe: Recipe
    model_name: str
    config: PretrainedConfig
    encoder: RowEncoder
    scored: list[tuple[Task, Decoding | None]]
    sources: list[SourceRows]
    held_out_sources: list[SourceRows]
    train: list[EncodedRow]
    held_out: list[EncodedRow]
    faults: list[RowFault]
    too_long: list[Place]
    tested: int
    validation: int
    general: list[EncodedRow]
    targets: list[TargetKind]
    parameters: tuple[int, int]
    sampler: LengthGroupedSampler
    steps: int
    optimizer: OptimizerChoice
    schedule: ScheduleChoice
    device: torch.device
    dtype: torch.dtype

    @property
    def effective_batch(self) -> int:
        """Rows of an optimizer step."""
        return self.sampler.batch_size

    @property
    def padding_share(self) -> float:
        """The share of padding in the first epoch, from 0 to 1."""
        return self.sampler.padding_share(self.recipe.training.batch_size)

    @property
    def tokens(self) -> tuple[int, int]:
        """All and supervised tokens of the training rows."""
        return sum(len(row.input_ids) for row in self.train), sum(row.supervised for row in self.train)

    @property
    def special_text(self) -> tuple[int, dict[str, int]]:
        """How many rows spell special tokens in their own text, and how often each token is spelled."""
        spelled = [row.special_text for row in (*self.train, *self.held_out, *self.general) if row.special_text]
        return len(spelled), dict(Counter(token for tokens in spelled for token in tokens).most_common())

    @property
    def conversations(self) -> list[str]:
        """What became of training conversations that could not be put as they are, a line for each reason."""
        lines = []
        for reason in dict.fromkeys(row.apart for row in self.train if row.apart):
            parts = [row.number for row in self.train if row.apart == reason]
            lines.append(
                f"{len(set(parts)):,} became {len(parts):,} rows, so that each answer has the context that generation "
                f"gives it: {reason}"
            )
        if joined := len({row.number for row in self.train if row.joined_system}):
            lines.append(
                f"{joined:,} have the system's text before the first question: the chat template refuses it as a turn"
            )
        return lines

    def marked(self, row: EncodedRow) -> list[tuple[str, bool]]:
        """Each token of a row as text, and whether it is supervised."""
        decode = self.encoder.tokenizer.decode
        return [(decode([token]), label != IGNORED) for token, label in zip(row.input_ids, row.labels, strict=True)]


def make_plan(recipe: Recipe, *, replicas: int | None = None) -> Plan:
    """Resolve and check a recipe. Config, tokenizer and data are read; the model is built on the meta device.

    Args:
        recipe: the recipe.
        replicas: processes of which each takes ``batch_size`` rows of its own; all that were launched where None.

    Raises:
        UserError: something does not fit; the message names the key of the recipe.
    """
    device = choose_device()
    dtype = choose_dtype(recipe.precision, device)
    scored = _scored(recipe)
    rows = choose_rows(recipe, [task for task, _ in scored])
    preflight.check_trackers(recipe.tracking.report_to)
    optimizer = choose_optimizer(recipe.training, device)
    model_name = resolve_model(recipe.model)
    config = load_config(model_name)
    check_quantized(recipe, config, [recipe.method])
    if isinstance(recipe.method, PeftMethod):
        check_precision(recipe.method.type, dtype)
        if recipe.merge:
            check_merges(recipe.method.type, "merge: found true")
    _check_smoothing(recipe, config)
    adapted, targets, parameters = _adapted_on_meta(recipe.method, config)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    group_members(trained, recipe.training.optimizer.groups)
    check_speed(recipe, config, adapted, device, dtype)
    special_text = recipe.data.special_text
    encoder = RowEncoder(
        load_tokenizer(model_name, recipe.chat_template),
        chat=recipe.chat,
        special_text=special_text,
        stop_token_ids=stop_token_ids(config, load_generation_config(model_name)),
    )
    faults = list(rows.faults)
    train, too_long = encode_rows(recipe, encoder, rows.train, "training", faults)
    held_out, _ = encode_rows(recipe, encoder, rows.held_out, "held-out", faults)
    preflight.check_supervision(train, "training")
    preflight.check_supervision(held_out, "held-out")
    training, general = recipe.training, recipe.evaluation.general
    if replicas is None:
        replicas = int(os.environ.get("WORLD_SIZE", "1"))
    if training.on_nonfinite == "skip" and replicas > 1:
        raise UserError(
            f"training.on_nonfinite: found skip with {replicas} processes, which would leave out different steps; set "
            "stop, or train in one process."
        )
    batch = training.batch_size * training.gradient_accumulation * replicas
    sampler = LengthGroupedSampler([len(row.input_ids) for row in train], batch, recipe.seed)
    steps = training.max_steps or math.ceil(training.epochs * math.ceil(len(train) / batch))
    return Plan(
        recipe=recipe,
        model_name=model_name,
        config=config,
        encoder=encoder,
        scored=scored,
        sources=rows.sources,
        held_out_sources=rows.held_out_sources,
        train=train,
        held_out=held_out,
        faults=faults,
        too_long=too_long,
        tested=rows.tested,
        validation=rows.validation,
        general=encode_general_text(general, encoder.tokenizer, training.max_length, special_text) if general else [],
        targets=targets,
        parameters=parameters,
        sampler=sampler,
        steps=steps,
        optimizer=optimizer,
        schedule=choose_schedule(training, steps),
        device=device,
        dtype=dtype,
    )


def check_quantized(recipe: Recipe, config: PretrainedConfig, methods: Sequence[AnyMethod]) -> None:
    """Check that none of some methods would have to change weights that are quantized.

    Raises:
        UserError: one would.
    """
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


def _check_smoothing(recipe: Recipe, config: PretrainedConfig) -> None:
    """Labels are smoothed in our own loss, which is not that of a mixture whose router is balanced."""
    text = config.get_text_config()
    is_balanced = hasattr(text, "output_router_logits") and getattr(text, "router_aux_loss_coef", 0.0) != 0.0
    if recipe.training.label_smoothing and is_balanced:
        raise UserError(
            f"training.label_smoothing: found {recipe.training.label_smoothing:g} with a mixture whose router has a "
            "balancing loss, beside which labels are not smoothed; leave it out, or set router_aux_loss_coef to 0 in "
            "the model's config."
        )


def _scored(recipe: Recipe) -> list[tuple[Task, Decoding | None]]:
    settings = recipe.evaluation
    tasks = [get_task(name, folder=recipe.data.folder, protocol=settings.protocol) for name in recipe.scored]
    if settings.likelihood:
        return [(as_multiple_choice(task, key="evaluation.likelihood", limit=settings.limit), None) for task in tasks]
    options: dict[str, Any] = {"samples": settings.samples, "temperature": settings.temperature, "seed": recipe.seed}
    return [(task, decoding_for(task, **options)) for task in tasks]


def adapt_on_meta(method: AnyMethod, config: PretrainedConfig) -> tuple[list[TargetKind], tuple[int, int]]:
    """What a method adapts, by kind, and the trainable and all parameters, from a model's config alone.

    Raises:
        UserError: the method does not fit the model.
    """
    return _adapted_on_meta(method, config)[1:]


def _adapted_on_meta(method: AnyMethod, config: PretrainedConfig) -> tuple[Any, list[TargetKind], tuple[int, int]]:
    model = meta_model(config)
    total = count_parameters(model)[1]
    try:
        adapted = apply_method(model, method)
        kinds = target_kinds(adapted)
        parameters = count_parameters(adapted)
    except NotImplementedError:
        # Torch says so of the meta device, which has no values: some methods start from those of the weights.
        assert isinstance(method, PeftMethod)
        adapted, kinds = kinds_by_layer(method, meta_model(config))
        trained = sum(kind.parameters for kind in kinds)
        parameters = trained, total + trained
    chosen = not isinstance(method, FullMethod) and isinstance(method.target_modules, str)
    preflight.check_towers(adapted, chosen=chosen)
    return adapted, kinds, parameters
