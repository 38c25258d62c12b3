"""What a recipe will do, worked out from the config, the tokenizer and the data, before any weight is loaded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from diablo import preflight
from diablo.data.batching import LengthGroupedSampler
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.rows import Row, RowFault, read_rows
from diablo.errors import UserError
from diablo.methods import TargetKind, apply_method, count_parameters, target_kinds
from diablo.models import choose_device, choose_dtype, load_config, load_tokenizer, meta_model, resolve_model
from diablo.recipe import DiabloMethod, LoraMethod, Recipe
from diablo.tasks import Task, get_task, without_tested


@dataclass(frozen=True)
class Plan:
    """A recipe with everything resolved that can be without the model's weights.

    Attributes:
        recipe: the recipe.
        model_name: folder or hub id that transformers understands.
        config: the model's config.
        encoder: rows to tokens.
        task: the recipe's task, if it has one.
        train: encoded training rows.
        held_out: encoded held-out rows; empty where there are none.
        faults: malformed rows that were left out.
        too_long: numbers of the rows left out because they exceed ``training.max_length``.
        targets: what the method adapts, by kind.
        parameters: trainable and all parameters.
        sampler: the order of training.
        steps: optimizer steps of the run.
        device: where it runs.
        dtype: dtype of the frozen weights.
    """

    recipe: Recipe
    model_name: str
    config: PretrainedConfig
    encoder: RowEncoder
    task: Task | None
    train: list[EncodedRow]
    held_out: list[EncodedRow]
    faults: list[RowFault]
    too_long: list[int]
    targets: list[TargetKind]
    parameters: tuple[int, int]
    sampler: LengthGroupedSampler
    steps: int
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

    def marked(self, row: EncodedRow) -> list[tuple[str, bool]]:
        """Each token of a row as text, and whether it is supervised."""
        decode = self.encoder.tokenizer.decode
        return [(decode([token]), label != IGNORED) for token, label in zip(row.input_ids, row.labels, strict=True)]


def make_plan(recipe: Recipe) -> Plan:
    """Resolve and check a recipe. Config, tokenizer and data are read; the model is built on the meta device.

    Raises:
        UserError: something does not fit; the message names the key of the recipe.
    """
    device = choose_device()
    dtype = choose_dtype(recipe.precision, device)
    task = get_task(recipe.task) if recipe.task else None
    train_rows, held_out_rows, faults = _rows(recipe, task)
    model_name = resolve_model(recipe.model)
    config = load_config(model_name)
    targets, parameters = _adapt_on_meta(recipe, config)
    encoder = RowEncoder(load_tokenizer(model_name), chat=recipe.chat, stop_token_ids=_stop_token_ids(config))
    train, too_long = _encode(recipe, encoder, train_rows)
    held_out, _ = _encode(recipe, encoder, held_out_rows)
    preflight.check_supervision(train, "training")
    preflight.check_supervision(held_out, "held-out")
    training = recipe.training
    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = training.batch_size * training.gradient_accumulation * world
    sampler = LengthGroupedSampler([len(row.input_ids) for row in train], batch, recipe.seed)
    steps = training.max_steps or math.ceil(training.epochs * math.ceil(len(train) / batch))
    return Plan(
        recipe=recipe,
        model_name=model_name,
        config=config,
        encoder=encoder,
        task=task,
        train=train,
        held_out=held_out,
        faults=faults,
        too_long=too_long,
        targets=targets,
        parameters=parameters,
        sampler=sampler,
        steps=steps,
        device=device,
        dtype=dtype,
    )


def _rows(recipe: Recipe, task: Task | None) -> tuple[list[Row], list[Row], list[RowFault]]:
    data = recipe.data
    if task is not None:
        tested = task.problems("test")
        kept, _ = without_tested(task.problems("train"), tested)
        train, held_out = ([problem.row for problem in problems] for problems in (kept, tested))
        return train[: data.limit], held_out[: recipe.evaluation.limit], []
    assert data.train is not None  # the recipe sees to it
    train, faults = read_rows(data.train, on_malformed=data.on_malformed)
    held_out, held_out_faults = read_rows(data.eval, on_malformed=data.on_malformed) if data.eval else ([], [])
    return train[: data.limit], held_out, faults + held_out_faults


def _encode(recipe: Recipe, encoder: RowEncoder, rows: list[Row]) -> tuple[list[EncodedRow], list[int]]:
    limit = recipe.training.max_length
    encoded = [encoder.encode(row) for row in rows]
    kept = [row for row in encoded if len(row.input_ids) <= limit]
    too_long = [row.number for row in encoded if len(row.input_ids) > limit]
    if too_long and (recipe.data.on_long == "error" or not kept):
        longest = max(len(row.input_ids) for row in encoded)
        raise UserError(
            f"training.max_length: found {limit}; {len(too_long)} of {len(rows)} rows are longer (up to {longest} "
            f"tokens; the first is row {too_long[0]}). Raise it, or set data.on_long=drop to leave some out."
        )
    return kept, too_long


def _adapt_on_meta(recipe: Recipe, config: PretrainedConfig) -> tuple[list[TargetKind], tuple[int, int]]:
    adapted = apply_method(meta_model(config), recipe.method)
    chosen = isinstance(recipe.method, (DiabloMethod, LoraMethod)) and isinstance(recipe.method.target_modules, str)
    preflight.check_towers(adapted, chosen=chosen)
    return target_kinds(adapted), count_parameters(adapted)


def _stop_token_ids(config: PretrainedConfig) -> list[int]:
    ids: Any = config.get_text_config().eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
