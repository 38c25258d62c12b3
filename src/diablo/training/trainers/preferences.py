"""Preferences: TRL's trainers that learn from pairs of completions, or from completions that are judged.

What the loss compares the model with, the model before training, is asked once, before the first step: the
log-likelihoods of all rows are kept, and no second model and no copy of the adapter is held while training.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from diablo.data.batching import collate
from diablo.data.encoding import IGNORED, EncodedRow
from diablo.planning.plan import Plan
from diablo.records.log import LOGGER
from diablo.records.progress import ProgressReport, TokenMeter
from diablo.scoring.generation import evaluating
from diablo.training.tracking import Tracked
from diablo.training.trainers.base import RunTrainer, number_of

Columns = list[dict[str, Any]]
_REFERENCE_ADAPTER = "ref"
"""What TRL calls the copy of the adapter that it adds for the reference."""


class TrackedDPOConfig(Tracked, DPOConfig):
    """TRL's arguments, with the recipe beside them."""


class TrackedKTOConfig(Tracked, KTOConfig):
    """TRL's arguments, with the recipe beside them."""


class Collator:
    """Makes batches of several sequences a row, and counts their tokens.

    Args:
        pad_token_id: fills sequences up.
        meter: counts the tokens.
        prefixes: what the names of a row's sequences begin with, as in ``rejected_input_ids``. Sequences whose prefixes
            stand together in one tuple are put into one batch, all of the first prefix before those of the next. The
            batch's names begin with the first prefix.
        values: the names of a row's numbers, which become tensors.
    """

    def __init__(
        self, pad_token_id: int, meter: TokenMeter, prefixes: Sequence[Sequence[str]], values: Sequence[str]
    ) -> None:
        self.pad_token_id, self.meter, self.prefixes, self.values = pad_token_id, meter, prefixes, values

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: for each group ``input_ids``, ``attention_mask`` and ``completion_mask``, each ``(rows, tokens)``.

        ``numbers`` are those of the rows, and a list.
        """
        batch: dict[str, Any] = {}
        for group in self.prefixes:
            sequences = [
                {"input_ids": row[f"{prefix}input_ids"], "labels": row[f"{prefix}labels"]}
                for prefix in group
                for row in rows
            ]
            made = collate(sequences, self.pad_token_id)
            batch[f"{group[0]}input_ids"] = made["input_ids"]
            batch[f"{group[0]}attention_mask"] = made["attention_mask"]
            batch[f"{group[0]}completion_mask"] = (made["labels"] != IGNORED).long()
            self.meter.count(sum(len(each["input_ids"]) for each in sequences), made["input_ids"].numel())
        for name in self.values:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return {**batch, "numbers": [number for row in rows for number in row["numbers"]]}


def _without_second_model(plan: Plan) -> dict[str, Any]:
    """What TRL is told so that it loads no reference: of an adapted model it loads none anyway, and asks for a hash."""
    return {"precompute_ref_log_probs": plan.recipe.method.name == "full"}


class PreferenceTrainer(RunTrainer):
    """What the trainers of preferences have in common; a class beside it has the loss and ``compute_ref_log_probs``.

    See :class:`diablo.training.trainers.base.RunTrainer` for the arguments.
    """

    # What is handed to the trainer is scaled here, so that a step that is left out counts as what it is.
    loss_is_scaled_for_ga: Any = True
    # Of the class beside it.
    _metrics: Any
    precompute_ref_logps: Any
    compute_ref_log_probs: Any
    reference: tuple[str, ...] = ()
    """The columns that the reference's log-likelihoods have; none where the loss has no reference."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        model: Any = self.model
        if isinstance(model, PeftModel) and _REFERENCE_ADAPTER in model.peft_config:
            # The log-likelihoods are kept in its place.
            model.delete_adapter(_REFERENCE_ADAPTER)
        self.held_out_columns = self.columns_of(self.plan.held_out)

    @staticmethod
    @abstractmethod
    def columns_of(rows: Sequence[EncodedRow]) -> Columns:
        """What the collator takes of rows."""

    @classmethod
    def columns(cls, plan: Plan) -> Columns:
        """What the collator takes of each training row."""
        return cls.columns_of(plan.train)

    def _prepare_dataset(self, dataset: Dataset, *arguments: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *arguments: Any) -> Dataset:
        # TRL would ask here, with its own batches; see prepare_for_rows.
        return dataset

    def prepare_for_rows(self) -> None:
        """Ask the model for the log-likelihoods of all rows as it is before training."""
        if not self.reference:
            return
        columns = self.columns(self.plan)
        self._add_reference(columns, "training")
        self._add_reference(self.held_out_columns, "held-out")
        self.train_dataset = Dataset.from_list(columns)
        self.precompute_ref_logps = True

    @torch.no_grad()
    def _add_reference(self, columns: Columns, what: str) -> None:
        """Add the reference's log-likelihoods to rows; each process asks for its share of them."""
        mine = list(range(self.accelerator.process_index, len(columns), self.accelerator.num_processes))
        found: list[tuple[int, list[float]]] = []
        model: Any = self.model
        # TRL asks the base model where it holds no reference: here the model itself is the reference.
        self.ref_model = model
        report = ProgressReport(self.progress.console, f"reference of {what} rows", len(mine))
        with report, evaluating(model):
            for indices, batch in self._batches(columns, mine):
                values = torch.stack(list(self.compute_ref_log_probs(model, batch)), dim=1).float().tolist()
                found += zip(indices, values, strict=True)
                report.update(len(found))
        self.ref_model = None
        gathered = gather_object(found) if self.accelerator.num_processes > 1 else found
        for index, of_row in gathered:
            columns[index] |= dict(zip(self.reference, of_row, strict=True))
        if columns:
            LOGGER.info("the log-likelihoods of %d %s rows before training are known", len(columns), what)

    def _batches(self, columns: Columns, indices: Iterable[int]) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Batches of rows of similar length, on the device, with their indices; the meter does not count them."""
        collator: Any = self.data_collator
        uncounted = Collator(collator.pad_token_id, TokenMeter(), collator.prefixes, collator.values)
        size = self.args.per_device_train_batch_size
        by_length = sorted(indices, key=lambda index: len(columns[index]["input_ids"]))
        for first in range(0, len(by_length), size):
            chosen = by_length[first : first + size]
            batch = uncounted([columns[index] for index in chosen])
            del batch["numbers"]
            yield chosen, self._prepare_inputs(batch)

    def held_out_figures(self) -> dict[str, float]:
        """The mean loss of held-out rows, and TRL's figures of them."""
        # It adds its figures of a batch to these lists.
        metrics: dict[str, list[float]] = self._metrics["eval"]
        metrics.clear()
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, int] = defaultdict(int)
        model: Any = self.model
        with evaluating(model), torch.no_grad(), self.compute_loss_context_manager():
            for indices, batch in self._batches(self.held_out_columns, range(len(self.held_out_columns))):
                loss = self._mean_loss(model, batch).item()
                found = {name: values[-1] for name, values in metrics.items()}
                metrics.clear()
                for name, value, count in [("loss", loss, len(indices)), *self.figures_of(found, batch)]:
                    sums[name] += value * count
                    counts[name] += count
        return self.settled({name: value / counts[name] for name, value in sums.items() if counts[name]})

    @staticmethod
    @abstractmethod
    def figures_of(metrics: Mapping[str, float], batch: Mapping[str, Any]) -> list[tuple[str, float, int]]:
        """What is kept of TRL's figures of a batch: each with its name here, and how many rows it is the mean of."""

    @staticmethod
    def settled(figures: dict[str, float]) -> dict[str, float]:
        """The figures of all rows, given their means."""
        return figures

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the rows, over all that make a step."""
        numbers = inputs.pop("numbers")
        bare = self.accelerator.unwrap_model(model)
        loss = self._mean_loss(model, inputs) / self.current_gradient_accumulation_steps

        def again() -> object:
            return bare(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

        return self.finite.check(bare, loss, self.state.global_step + 1, numbers, again)

    def _mean_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss: Any = super().compute_loss(model, inputs)
        return loss


def _sequence(row: EncodedRow, prefix: str = "") -> dict[str, Any]:
    """The columns of a sequence, whose names begin with a prefix."""
    return {f"{prefix}input_ids": row.input_ids, f"{prefix}labels": row.labels}


class TrainerOfPairs(PreferenceTrainer):
    """What the trainers of pairs have in common; see :class:`PreferenceTrainer`."""

    @staticmethod
    def columns_of(rows: Sequence[EncodedRow]) -> Columns:
        """Both completions of each row, each behind the prompt."""
        pairs = [(row, row.rejected) for row in rows if row.rejected is not None]
        return [
            {**_sequence(chosen), **_sequence(rejected, "rejected_"), "numbers": [number_of(chosen)]}
            for chosen, rejected in pairs
        ]

    @classmethod
    def collator(cls, plan: Plan, meter: TokenMeter) -> Collator:
        """Makes batches, and counts their tokens."""
        return Collator(plan.encoder.tokenizer.pad_token_id, meter, [("", "rejected_")], cls.reference)


class PairTrainer(TrainerOfPairs, DPOTrainer):
    """DPO, and the losses of its kind."""

    config_class = TrackedDPOConfig
    reference: tuple[str, ...] = ("ref_chosen_logps", "ref_rejected_logps")

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone."""
        objective: Any = plan.recipe.objective
        return {
            "beta": objective.beta,
            "loss_type": objective.loss,
            "loss_weights": objective.loss_weights,
            "label_smoothing": objective.label_smoothing,
            "max_length": None,
            **_without_second_model(plan),
        }

    @staticmethod
    def figures_of(metrics: Mapping[str, float], batch: Mapping[str, Any]) -> list[tuple[str, float, int]]:
        """The share of pairs whose better completion has the larger reward, and by how much it is larger."""
        pairs = len(batch["input_ids"]) // 2
        return [("accuracy", metrics["rewards/accuracies"], pairs), ("margin", metrics["rewards/margins"], pairs)]


class OddsRatioTrainer(PairTrainer):
    """ORPO (Hong et al., 2024, arXiv 2403.07691): supervised fine-tuning and a preference in one loss."""

    reference = ()

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone."""
        objective: Any = plan.recipe.objective
        return {"beta": objective.beta, "max_length": None, **_without_second_model(plan)}

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> torch.Tensor:
        """The mean loss of a chosen token, and the weighted mean of minus the log-sigmoid of the odds' log-ratio.

        The likelihood of a completion is the geometric mean of those of its tokens, and p / (1 - p) its odds: equations
        4 to 6 of the paper, whose lambda is ``beta``.
        """
        mask = inputs["completion_mask"][:, 1:]
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**given, use_cache=False, labels=labels, fused_lm_head=True)
        # Prompts that were learned are put before the tokens.
        summed = outputs.log_probs[:, -mask.shape[1] :].sum(dim=1)
        means = summed / mask.sum(dim=1)
        chosen, rejected = means.chunk(2)
        # log(1 - p) by expm1, which is exact where p is near 1.
        log_odds = [mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7))) for mean in (chosen, rejected)]
        preference = -F.logsigmoid(log_odds[0] - log_odds[1]).mean()
        learned = -summed[: len(chosen)].sum() / mask[: len(chosen)].sum()
        figures: dict[str, list[float]] = self._metrics["train" if model.training else "eval"]
        for name, value in (
            ("nll_loss", learned),
            ("rewards/accuracies", (chosen > rejected).float().mean()),
            ("rewards/margins", self.beta * (chosen - rejected).mean()),
        ):
            figures[name].append(value.item())
        return learned + self.beta * preference


class JudgedTrainer(PreferenceTrainer, KTOTrainer):  # pyrefly: ignore[inconsistent-inheritance]
    """KTO (Ethayarajh et al., 2024, arXiv 2402.01306).

    How far the model has moved is estimated on completions that stand behind the prompt of another row, as the paper
    does: the completion of the row before, in the order of the file.
    """

    config_class = TrackedKTOConfig
    reference = ("ref_logps", "ref_KL_logps")

    @staticmethod
    def settings(plan: Plan) -> dict[str, Any]:
        """Arguments of the config that are of this trainer alone."""
        objective: Any = plan.recipe.objective
        return {
            "beta": objective.beta,
            "loss_type": objective.loss,
            "desirable_weight": objective.desirable_weight,
            "undesirable_weight": objective.undesirable_weight,
            "max_length": None,
            # The pairs of the estimate are fixed, whatever the sampler; TRL's own depend on the order.
            "train_sampling_strategy": "sequential",
            **_without_second_model(plan),
        }

    @staticmethod
    def columns_of(rows: Sequence[EncodedRow]) -> Columns:
        """Each completion behind its prompt, and behind that of the next row."""
        columns = []
        for row, before in zip(rows, [*rows[-1:], *rows[:-1]], strict=True):
            start, start_before = (
                next(index for index, label in enumerate(each.labels) if label != IGNORED) for each in (row, before)
            )
            elsewhere = EncodedRow(
                row.number,
                row.input_ids[:start] + before.input_ids[start_before:],
                row.labels[:start] + before.labels[start_before:],
            )
            columns.append(
                {
                    **_sequence(row),
                    **_sequence(elsewhere, "KL_"),
                    "label": bool(row.desired),
                    "numbers": [number_of(row)],
                }
            )
        return columns

    @classmethod
    def collator(cls, plan: Plan, meter: TokenMeter) -> Collator:
        """Makes batches, and counts their tokens."""
        objective: Any = plan.recipe.objective
        # The other loss makes no estimate, and its steps do not read these sequences.
        groups = [("",), ("KL_",)] if objective.loss == "kto" else [("",)]
        return Collator(plan.encoder.tokenizer.pad_token_id, meter, groups, ("label", *cls.reference))

    @staticmethod
    def figures_of(metrics: Mapping[str, float], batch: Mapping[str, Any]) -> list[tuple[str, float, int]]:
        """The rewards of good and of bad completions, and how far the model has moved."""
        rows = len(batch["label"])
        good = int(batch["label"].sum())
        # A batch may have no row of one kind.
        rewards = [
            (name, metrics[f"rewards/{name}"], count)
            for name, count in (("chosen", good), ("rejected", rows - good))
            if count
        ]
        return [*rewards, ("kl", metrics["kl"], rows)]

    @staticmethod
    def settled(figures: dict[str, float]) -> dict[str, float]:
        """By how much the mean reward of good completions is larger than that of bad ones, in the place of the two."""
        chosen, rejected = figures.pop("chosen", None), figures.pop("rejected", None)
        return figures if chosen is None or rejected is None else figures | {"margin": chosen - rejected}

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The log-likelihoods of completions behind their own prompts and behind those of others, each ``(rows,)``."""
        own, elsewhere = super().compute_ref_log_probs(model, inputs)
        return own, own.new_full(own.shape, math.nan) if elsewhere is None else elsewhere
