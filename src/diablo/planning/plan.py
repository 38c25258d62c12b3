"""What a recipe will do, as far as it is known before any weight is loaded: figures, and words for them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from diablo.data.batching import GroupSampler, LengthGroupedSampler
from diablo.data.encoding import IGNORED, EncodedRow, RowEncoder
from diablo.data.faults import Place, Placed, RowFault, by_reason, name_places
from diablo.data.packing import join
from diablo.data.reading.sources import SourceRows
from diablo.data.special_text import describe_special_text
from diablo.errors import shortened
from diablo.models.heads import Head, head_modules
from diablo.models.loading import (
    meta_model,
)
from diablo.models.vectors import Vectors
from diablo.models.vocabulary import TrainedTokens
from diablo.planning.compared import loss_of
from diablo.planning.labels import describe_counts
from diablo.planning.materials import ScoredTask
from diablo.planning.optimizers import OptimizerChoice
from diablo.planning.schedules import ScheduleChoice
from diablo.planning.tokens import TokenCounts
from diablo.recipes.applying import TargetKind
from diablo.recipes.embedding import EmbeddingObjective
from diablo.recipes.recipe import Recipe
from diablo.recipes.starting import prompts_of_another_form
from diablo.scoring.rewards import Rewards
from diablo.tasks import Problem


@dataclass(frozen=True)
class Plan:
    """A recipe with everything resolved that can be without the model's weights.

    Attributes:
        recipe: the recipe.
        model_name: folder or hub id that transformers understands.
        config: the model's config, with the rows that the tokens need.
        encoder: rows to tokens.
        trained_tokens: tokens whose rows are trained; None where there are none.
        scored: the tasks that are scored before and after.
        validated: the tasks whose score on validation problems says which step is best; none where the loss says it.
        validation_problems: these problems, by task.
        sources: what the training rows were read from; nothing where they are a task's.
        held_out_sources: the same of the held-out rows; nothing where they are cut out of the training rows.
        train: encoded training rows.
        held_out: encoded held-out rows; empty where there are none.
        faults: rows that were left out because they are malformed, or the chat template does not take them.
        too_long: where the rows stand that are left out because they exceed ``training.max_length``.
        tested: how many training rows were left out because their prompt is one that is tested on.
        near_copies: how many problems that are tested on have the words of a training row, and how many there are.
        validation: how many rows were kept out of training for validation.
        general: encoded general text, whose loss is measured before and after training; empty where there is none.
        targets: what the method adapts, by kind.
        parameters: trainable and all parameters.
        sequences: the training rows of each sequence, as indices of ``train``: several where they are packed, and
            otherwise one.
        sampler: the order of training, of the sequences.
        steps: optimizer steps of the run, where held-out losses do not end it before.
        optimizer: the optimizer.
        schedule: the schedule of its learning rate.
        device: where it runs.
        dtype: dtype of the frozen weights.
        rewards: what completions are worth that are written in training; None where none are.
        head: what the model has in place of its output layer; None where it keeps that.
        has_own_head: whether the model has that head already, and training goes on with its weights.
        vectors: how texts become vectors; None where they do not.
    """

    recipe: Recipe
    model_name: str
    config: PretrainedConfig
    encoder: RowEncoder
    trained_tokens: TrainedTokens | None
    scored: list[ScoredTask]
    validated: list[ScoredTask]
    validation_problems: dict[str, list[Problem]]
    sources: list[SourceRows]
    held_out_sources: list[SourceRows]
    train: list[EncodedRow]
    held_out: list[EncodedRow]
    faults: list[RowFault]
    too_long: list[Place]
    tested: int
    near_copies: tuple[int, int]
    validation: int
    general: list[EncodedRow]
    targets: list[TargetKind]
    parameters: tuple[int, int]
    sequences: list[list[int]]
    sampler: LengthGroupedSampler
    steps: int
    optimizer: OptimizerChoice
    schedule: ScheduleChoice
    device: torch.device
    dtype: torch.dtype
    rewards: Rewards | None = None
    head: Head | None = None
    has_own_head: bool = False
    vectors: Vectors | None = None

    @property
    def effective_batch(self) -> int:
        """Sequences of an optimizer step: rows, where they are not packed, or completions of prompts."""
        return self.sampler.batch_size

    @property
    def effective_batch_in_words(self) -> str:
        """What an optimizer step is of."""
        if isinstance(self.sampler, GroupSampler):
            prompts = self.effective_batch // self.sampler.generations
            of = f"{self.sampler.generations} of each of {prompts} prompts" if prompts > 1 else "all of one prompt"
            return f"{self.effective_batch} completions, {of}"
        if not self.recipe.training.packing:
            return f"{self.effective_batch} rows"
        rows = self.effective_batch * len(self.train) / len(self.sequences)
        return f"{self.effective_batch} sequences, about {rows:.0f} rows"

    @property
    def is_flat(self) -> bool:
        """Whether a batch is one sequence without padding: flash attention tells packed rows apart by itself."""
        attention = self.recipe.attention
        return self.recipe.training.packing and is_flash_attention_requested(
            requested_attention_implementation=attention
        )

    @property
    def padding_share(self) -> float:
        """The share of padding in the first epoch, from 0 to 1."""
        if self.is_flat:
            return 0.0
        apart = [row.parts for row in self.train] if self.encoder.encoder_decoder else []
        return self.sampler.padding_share(self.recipe.training.batch_size, [*zip(*apart, strict=True)] or None)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with the completion of a prompt."""
        return max(self.sampler.lengths) + self.recipe.max_new_tokens

    def rows_of(self, sequence: int) -> list[EncodedRow]:
        """The rows of a training sequence."""
        return [self.train[index] for index in self.sequences[sequence]]

    def features_of(self, sequence: int) -> dict[str, list[int]]:
        """What a collator takes of a training sequence."""
        rows = self.rows_of(sequence)
        return join(rows) if self.recipe.training.packing else rows[0].features

    @property
    def tokens(self) -> tuple[int, int]:
        """All and supervised tokens of the training rows."""
        return sum(row.tokens for row in self.train), sum(row.supervised for row in self.train)

    @property
    def images(self) -> int:
        """How many images the training rows have."""
        return sum(len(row.images) for row in self.train)

    @property
    def special_text(self) -> tuple[int, dict[str, int]]:
        """How many rows spell special tokens in their own text, and how often each token is spelled."""
        spelled = [row.special_text for row in (*self.train, *self.held_out, *self.general) if row.special_text]
        return len(spelled), dict(Counter(token for tokens in spelled for token in tokens).most_common())

    @property
    def run_together(self) -> str:
        """What is to be said of training rows whose completion follows the prompt without a space; empty if few do."""
        found = [row.run_together for row in self.train if row.run_together]
        if 2 * len(found) <= len(self.train):
            return ""
        return (
            f"{len(found):,} of {len(self.train):,} completions follow their prompt without a space, as in "
            f"{shortened(found[0])}; end the prompt with a cue, such as ' Answer:', and begin the completion with a "
            "space, by templates in data.columns, or set chat: true for a model that was made to chat"
        )

    @property
    def long_warmup(self) -> str:
        """What is to be said of a warm-up that does not end before the run; empty where it does."""
        warmup = self.recipe.training.warmup_steps
        if warmup < self.steps:
            return ""
        return f"found {warmup} of {self.steps} steps, so that the learning rate never reaches its value; give fewer"

    @property
    def token_counts(self) -> TokenCounts | None:
        """How often the tokens whose rows are trained occur; None where there are none."""
        if self.trained_tokens is None:
            return None
        return TokenCounts(self.trained_tokens, self.train, plain=self.recipe.data.special_text == "plain")

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

    @property
    def prompts_before(self) -> str:
        """How the adapter that training goes on from was trained where this recipe puts its rows otherwise.

        Empty where it does not, and where training goes on from none.
        """
        recipe, adapter = self.recipe, self.recipe.adapter
        if adapter is None:
            return ""
        found = prompts_of_another_form(adapter, recipe.chat, recipe.chat_template, recipe.data.special_text)
        return f"{adapter} was trained with {', '.join(found)}, and this recipe puts rows otherwise" if found else ""

    def objective_lines(self) -> Iterator[str]:
        """What is trained for, where that is not supervised, in lines of two columns."""
        objective = self.recipe.objective
        if objective.name != "sft":
            yield f"objective           {objective.describe()}"
        if objective.name == "grpo":
            yield f"completions         up to {self.recipe.max_new_tokens} tokens"
        if isinstance(objective, EmbeddingObjective) and self.vectors is not None:
            yield f"vectors             {self.vectors.describe()}"
            told = {name: self.vectors.prompts.get(name) for name in ("query", "document")}
            if not self.is_scored and (prompts := [f"{name} {text!r}" for name, text in told.items() if text]):
                yield f"prompts of texts    {', '.join(prompts)}"
            loss = loss_of(objective, scored=self.is_scored)
            yield f"loss                {loss}, of {len(self.train[0].sequences)} texts a row"
        elif self.head is not None:
            modules = ", ".join(head_modules(meta_model(self.config)))
            whose = "the model's own, gone on with" if self.has_own_head else "new"
            yield f"head                {whose}: {modules}, trained whole"
        if self.head is not None and self.head.labels:
            yield f"labels              {describe_counts(self.labels)}"
        if objective.rows == "judged":
            good = sum(bool(row.desired) for row in self.train)
            yield f"judged              {good:,} good and {len(self.train) - good:,} bad completions"
        dropout = getattr(self.recipe.method, "dropout", 0.0)
        if dropout and (objective.has_reference or objective.name == "grpo"):
            yield f"dropout             off: the adapter was trained with {dropout:g}, and this objective has none"

    @property
    def labels(self) -> dict[str, int]:
        """How many training rows, or their words, have each label, in the order of the labels."""
        if self.head is None:
            return {}
        names, counts = self.head.labels, Counter[int]()
        for row in self.train:
            if isinstance(row.target, tuple):
                counts.update(index for index, value in enumerate(row.target) if value)
            else:
                counts.update([row.target] if isinstance(row.target, int) else [tag for tag in row.labels if tag >= 0])
        return {name: counts[index] for index, name in enumerate(names)}

    @property
    def is_scored(self) -> bool:
        """Whether rows are two texts with a number that says how near they are."""
        return self.train[0].target is not None

    @property
    def cut(self) -> int:
        """How many rows have lost the end of their text, since they exceed ``training.max_length``."""
        return sum(row.is_cut for row in (*self.train, *self.held_out))

    def data_lines(self) -> Iterator[str]:
        """What rows there are, what they are for and which are left out, in lines of two columns."""
        if self.prompts_before:
            yield f"prompts             {self.prompts_before}"
        for source in self.sources:
            yield f"source              {source.describe()}"
        for source in self.held_out_sources:
            yield f"held-out source     {source.describe()}"
        yield self._rows_line
        yield from self.token_counts.lines() if self.token_counts else ()
        for line in self.conversations:
            yield f"conversations       {line}"
        if self.recipe.training.packing:
            each = len(self.train) / len(self.sequences)
            yield (
                f"packing             into {len(self.sequences):,} sequences of up to {self.longest:,} tokens, "
                f"{each:.1f} rows in each"
            )
        yield f"held-out rows       {len(self.held_out):,}"
        if self.validation:
            yield f"validation rows     {self.validation:,} kept out of training"
        if self.general:
            yield f"general text        {len(self.general):,} rows, whose loss is measured before and after"
        for rows, fault in by_reason(self.faults):
            yield f"malformed, left out {rows}: {fault.reason}"
        if self.too_long:
            yield f"too long, left out  {name_places(self.too_long)}"
        if self.cut:
            yield f"too long, cut       {self.cut:,} rows (data.on_long: truncate)"
        if self.tested:
            yield f"tested rows         {self.tested} left out of training"
        if self.near_copies[0]:
            found, problems = self.near_copies
            yield (
                f"near copies         {found:,} of {problems:,} test problems have the words of a training row, with "
                "other numbers or punctuation"
            )
        yield from self._text_lines()

    def _text_lines(self) -> Iterator[str]:
        if self.special_text[0]:
            yield f"special text        {describe_special_text(*self.special_text, self.recipe.data.special_text)}"
        if run_together := self.run_together:
            yield f"run together        {run_together}"

    @property
    def _rows_line(self) -> str:
        tokens, supervised = self.tokens
        if self.rewards is not None:
            return f"prompts             {len(self.train):,}: {tokens:,} tokens"
        if self.vectors is not None:
            return f"training rows       {len(self.train):,}: {tokens:,} tokens"
        seen = "" if self.encoder.images is None else f"; {self.images:,} images, which are read batch by batch"
        return f"training rows       {len(self.train):,}: {tokens:,} tokens, {supervised:,} of them supervised{seen}"

    def data_record(self) -> dict[str, Any]:
        """What rows there are, what they are for and which are left out, as values of JSON."""
        tokens, supervised = self.tokens
        spelling, special_tokens = self.special_text
        return {
            "rows": len(self.train),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "images": self.images,
            "held_out_rows": len(self.held_out),
            "validation_rows": self.validation,
            "train": [source.record() for source in self.sources],
            "eval": [source.record() for source in self.held_out_sources],
            "malformed_rows_skipped": _places(self.faults),
            "long_rows_dropped": _places(self.too_long),
            "long_rows_cut": self.cut,
            "labels": self.labels,
            "tested_rows_left_out": self.tested,
            "near_copies": dict(zip(("found", "problems"), self.near_copies, strict=True)),
            "special_text": {"rows": spelling, "tokens": special_tokens},
            "sequences": len(self.sequences),
        }

    def record(self) -> dict[str, Any]:
        """The plan as values of JSON; what a run's record has, too, has the same names there.

        ``examples`` are the sequences of two rows, each as a list of tokens with ``text`` and ``supervised``.
        """
        trainable, total = self.parameters
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "precision": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "targets": [asdict(target) for target in self.targets],
            "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
            "trained_tokens": self.token_counts and self.token_counts.record(),
            "data": {
                **self.data_record(),
                "general_rows": len(self.general),
                "conversations": self.conversations,
                "padding_share": self.padding_share,
            },
            "training": {
                "optimizer": self.optimizer.describe(),
                "schedule": self.schedule.describe(),
                "steps": self.steps,
                "effective_batch": self.effective_batch,
            },
            "scored": {
                task.name: {
                    "measure": task.measure,
                    "protocol": task.protocol if decoding else "likelihood",
                    "decoding": decoding and decoding.describe(),
                }
                for task, decoding in self.scored
            },
            "examples": [
                [{"text": text, "supervised": is_supervised} for text, is_supervised in self.marked(each)]
                for row in self.train[:2]
                for each in row.sequences
            ],
            "targets_of_examples": [self.said_of(row) for row in self.train[:2]] if self.head is not None else None,
        }

    def said_of(self, row: EncodedRow) -> str:
        """What the model is to say of a row, in words; empty where it is to write."""
        if self.head is None or row.rejected is not None or (row.others and row.target is None):
            return ""
        labels = self.head.labels
        if isinstance(row.target, tuple):
            return ", ".join(label for label, value in zip(labels, row.target, strict=True) if value) or "none"
        if isinstance(row.target, int) and labels:
            return labels[row.target]
        return f"{row.target:g}" if row.target is not None else " ".join(labels[tag] for tag in row.labels if tag >= 0)

    def marked(self, row: EncodedRow) -> list[tuple[str, bool]]:
        """Each token of a row as text, and whether it is supervised; those that stand for one image are one entry."""
        images = self.encoder.images
        marked: list[tuple[str, bool]] = []
        pairs = itertools.groupby(zip(row.input_ids, row.labels, strict=True))
        for (token, label), group in pairs:
            text, count = self._text_of(token), sum(1 for _ in group)
            repeated = images is not None and token == images.repeated and count > 1
            marked += [(f"{text} x {count}", False)] if repeated else [(text, label != IGNORED)] * count
        return marked

    def _text_of(self, token: int) -> str:
        text = self.encoder.tokenizer.decode([token])
        # As SentencePiece has it, a space is part of the token behind it, and none is decoded at the start of a text.
        has_space = self.encoder.tokenizer.convert_ids_to_tokens(token).startswith("▁")
        return f" {text}" if has_space and not text.startswith(" ") else text


def _places(rows: Sequence[Placed]) -> list[int | str]:
    """Rows by number, and by file and number where there are several files."""
    return [name_places([row]) if row.source else row.number for row in rows]
