"""A recipe to a trained adapter: TRL's SFTTrainer, with the loss on completions and batches of similar length."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from diablo import preflight
from diablo.checkpoints import save_adapter, save_start
from diablo.data.batching import LengthGroupedSampler, collate
from diablo.data.encoding import EncodedRow
from diablo.errors import UserError
from diablo.evaluation import Score, held_out_loss
from diablo.losses import summed_completion_loss
from diablo.merging import merge_adapter
from diablo.methods import apply_method, count_parameters
from diablo.models import is_placed, load_model
from diablo.planning import Plan, make_plan
from diablo.progress import TokenMeter, TrainingProgress
from diablo.recipe import FullMethod, Recipe
from diablo.results import (
    changed_settings,
    describe_machine,
    describe_versions,
    peak_memory_bytes,
    plot_losses,
    write_json,
)
from diablo.scoring import score_tasks, write_answers


@dataclass
class RunResult:
    """What a run left behind.

    Attributes:
        folder: the output folder.
        adapter: folder of the adapter, or of the whole model for full fine-tuning.
        merged: folder of the merged model, where the recipe asks for one.
        before: scores before training by task, where the recipe asks for them.
        after: scores after training, likewise.
        record: what ``run.json`` holds.
    """

    folder: Path
    adapter: Path
    merged: Path | None = None
    before: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def train(
    recipe: Recipe, *, console: Console | None = None, resume: bool = False, overwrite: bool = False
) -> RunResult:
    """Carry out a recipe: check, train, save, score.

    The output folder then holds ``adapter/`` (``model/`` for full fine-tuning), ``merged/`` where asked for,
    ``run.json``, ``loss.png``, ``recipe.yaml``, the answers of what was scored as ``answers-before.jsonl`` and
    ``answers-after.jsonl`` and, where ``training.save_steps`` is set, ``checkpoints/``.

    Args:
        recipe: the recipe.
        console: where progress is written; standard error where None.
        resume: go on from the last checkpoint in the output folder.
        overwrite: discard an unfinished run that lies in the output folder.

    Raises:
        UserError: something in the recipe, the data or the output folder does not fit.
    """
    console = console or Console(stderr=True)
    checkpoint = _check_output(recipe, resume=resume, overwrite=overwrite)
    plan = make_plan(recipe)
    timings: dict[str, float] = {}
    set_seed(recipe.seed)

    start = time.perf_counter()
    is_full = isinstance(recipe.method, FullMethod)
    # Full fine-tuning needs fp32 weights, or small updates are lost to rounding; autocast lowers the products.
    dtype = torch.float32 if is_full else plan.dtype
    model = load_model(plan.model_name, dtype, recipe.attention, recipe.quantization)
    model = apply_method(model, recipe.method)
    model = model if is_placed(model) else model.to(plan.device)
    timings["load_seconds"] = time.perf_counter() - start

    _open_output(recipe, resume=resume)
    adapter_start = save_start(model, recipe.output / "start")
    result = RunResult(recipe.output, recipe.output / ("model" if is_full else "adapter"))
    if recipe.evaluation.before:
        result.before = _score(model, plan, console, "before")
    losses = Losses()
    if plan.held_out:
        losses.held_out.append((0, _held_out(model, plan)))
    if plan.general:
        losses.general.append(_loss_of(model, plan, plan.general))

    meter = TokenMeter()
    trainer = _make_trainer(model, plan, console, meter, losses)
    _check_first_batch(trainer, plan)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.progress.close()
    timings["train_seconds"] = time.perf_counter() - start - meter.paused_seconds
    training_peak = peak_memory_bytes()
    if plan.held_out and losses.held_out[-1][0] != trainer.state.global_step:
        losses.held_out.append((trainer.state.global_step, _held_out(model, plan)))
    if plan.general:
        losses.general.append(_loss_of(model, plan, plan.general))
    losses.train = [(int(log["step"]), log["loss"]) for log in trainer.state.log_history if "loss" in log]

    save_adapter(model, plan.encoder.tokenizer, result.adapter, start=adapter_start)
    if adapter_start is not None:
        shutil.rmtree(adapter_start)
    if recipe.evaluation.after:
        result.after = _score(model, plan, console, "after")
    if recipe.merge and not is_full:
        result.merged = recipe.output / "merged"
        merge_adapter(result.adapter, result.merged)
    result.record = _record(plan, model, result, losses, meter, timings, training_peak, trainer.state.global_step)
    write_json(recipe.output / "run.json", result.record)
    plot_losses(recipe.output / "loss.png", losses.train, losses.held_out, f"{recipe.method.name} on {recipe.model}")
    return result


@dataclass
class Losses:
    """Loss per supervised token in nats, by step; of general text before and after training."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    general: list[float] = field(default_factory=list)


class CompletionTrainer(SFTTrainer):
    """TRL's trainer over rows that are encoded already.

    Args:
        plan: gives the sampler and the device.
        progress: the training bar.
        options: arguments of ``SFTTrainer``.
    """

    def __init__(self, *, plan: Plan, progress: TrainingProgress, **options: Any) -> None:
        self.sampler: LengthGroupedSampler = plan.sampler
        self.progress = progress
        super().__init__(**options)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGroupedSampler:
        return self.sampler

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
        if self.aux_loss_enabled or return_outputs:
            inputs = {name: values for name, values in inputs.items() if name != "predicting"}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        count = len(inputs["predicting"]) if num_items_in_batch is None else num_items_in_batch
        loss = summed_completion_loss(model, inputs) / count
        # The count is that of all processes, and DDP averages the gradients over them.
        return loss * self.accelerator.num_processes if num_items_in_batch is not None else loss


class _HeldOutLoss(TrainerCallback):
    """Measures the held-out loss every ``training.eval_steps`` steps."""

    def __init__(self, plan: Plan, meter: TokenMeter, losses: Losses) -> None:
        self.plan, self.meter, self.losses = plan, meter, losses

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        every = self.plan.recipe.training.eval_steps
        if every and state.global_step % every == 0:
            with self.meter.pause():
                self.losses.held_out.append((state.global_step, _held_out(model, self.plan)))


class _CheckOptimizer(TrainerCallback):
    """The last check before the first step: the optimizer exists only now."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        preflight.check_optimizer(getattr(optimizer, "optimizer", optimizer), model)


class _MeteredCollator:
    """Makes batches and counts their tokens."""

    def __init__(self, pad_token_id: int, meter: TokenMeter) -> None:
        self.pad_token_id, self.meter = pad_token_id, meter

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = collate(features, self.pad_token_id)
        self.meter.count(sum(len(row["input_ids"]) for row in features), batch["input_ids"].numel())
        return batch


def _make_trainer(model: Any, plan: Plan, console: Console, meter: TokenMeter, losses: Losses) -> CompletionTrainer:
    training = plan.recipe.training
    config = SFTConfig(
        output_dir=str(plan.recipe.output / "checkpoints"),
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing,
        logging_steps=training.logging_steps,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        save_total_limit=training.save_total_limit,
        bf16=plan.dtype == torch.bfloat16,
        fp16=plan.dtype == torch.float16,
        use_cpu=plan.device.type == "cpu",
        seed=plan.recipe.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=plan.device.type == "cuda",
        # Its filter asks the device in each step whether the loss is finite.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    # Several GPUs are for several processes: in one, torch's DataParallel would copy the model to each in each step.
    config._n_gpu = min(config.n_gpu, 1)
    pad_token_id = plan.encoder.tokenizer.pad_token_id
    progress = TrainingProgress(console, meter)
    # TRL rounds what is trained over weights of bitsandbytes to bf16; it stays as it is here.
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    trainer = CompletionTrainer(
        plan=plan,
        progress=progress,
        model=model,
        args=config,
        train_dataset=Dataset.from_list([row.features for row in plan.train]),
        processing_class=plan.encoder.tokenizer,
        data_collator=_MeteredCollator(pad_token_id, meter),
        callbacks=[progress, _HeldOutLoss(plan, meter, losses), _CheckOptimizer()],
    )
    for parameter, values in trained:
        parameter.data = values
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _check_first_batch(trainer: CompletionTrainer, plan: Plan) -> None:
    model: Any = trainer.model
    preflight.check_trainable(model)
    rows = [plan.train[index] for index in plan.sampler.batches()[0]]
    batch = collate([row.features for row in rows], plan.encoder.tokenizer.pad_token_id)
    preflight.check_stop_tokens(rows, batch, plan.encoder.stop_token_ids)
    shortest = min(rows, key=lambda row: len(row.input_ids))
    probe = collate([shortest.features], plan.encoder.tokenizer.pad_token_id)
    checkpointing = plan.recipe.training.gradient_checkpointing
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    with torch.autocast(plan.device.type, dtype=plan.dtype, enabled=plan.dtype != torch.float32):
        moved = {name: values.to(plan.device) for name, values in probe.items()}
        preflight.check_gradients(model, moved, checkpointing=checkpointing)


def _score(model: Any, plan: Plan, console: Console, when: str) -> dict[str, Score]:
    if not plan.scored:
        return {}
    settings = plan.recipe.evaluation
    scores = score_tasks(
        model,
        plan.encoder,
        plan.scored,
        console=console,
        batch_size=settings.batch_size,
        limit=settings.limit,
        when=when,
    )
    write_answers(plan.recipe.output / f"answers-{when}.jsonl", scores.values())
    return scores


def _held_out(model: Any, plan: Plan) -> float:
    return _loss_of(model, plan, plan.held_out)


def _loss_of(model: Any, plan: Plan, rows: Sequence[EncodedRow]) -> float:
    return held_out_loss(model, rows, plan.encoder.tokenizer.pad_token_id)


def _check_output(recipe: Recipe, *, resume: bool, overwrite: bool) -> str | None:
    """Check that the output folder may be written to, and find the checkpoint to go on from. Changes nothing."""
    folder = recipe.output
    checkpoints = folder / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if resume:
        if last is None:
            raise UserError(
                f"output: there is no checkpoint in {str(folder)!r} to resume from; run without --resume, and set "
                "training.save_steps to have some."
            )
        _check_same_run(recipe, folder / "recipe.yaml")
        return last
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise UserError(f"output: {str(folder)!r} has files that diablo did not write; give a new or empty folder.")
    is_unfinished = last is not None and not (folder / "run.json").is_file()
    if is_unfinished and not overwrite:
        raise UserError(
            f"output: {str(folder)!r} holds an unfinished run; --resume goes on with it, --overwrite discards it."
        )
    return None


def _check_same_run(recipe: Recipe, path: Path) -> None:
    """A resumed run must be told what the interrupted one was told, reporting aside."""
    started = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    free = {"output", "evaluation", "merge", "eval_steps", "save_steps", "save_total_limit", "logging_steps"}
    names = changed_settings(started, recipe.model_dump(mode="json"))
    changed = [name for name in names if not free & set(name.split("."))]
    # What is scored says which rows are left out of training.
    if (started.get("evaluation") or {}).get("tasks") != recipe.evaluation.tasks:
        changed.append("evaluation.tasks")
    if changed:
        raise UserError(
            f"{', '.join(changed)}: changed since the run that is to be resumed; set them back as {path} has them, or "
            "start a new run with --overwrite."
        )


def _open_output(recipe: Recipe, *, resume: bool) -> None:
    """Make the output folder and clear it of an earlier run."""
    folder = recipe.output
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter", "model", "merged", "start", *([] if resume else ["checkpoints"])):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "answers-before.jsonl", "answers-after.jsonl"):
        (folder / name).unlink(missing_ok=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")


def _record(
    plan: Plan,
    model: Any,
    result: RunResult,
    losses: Losses,
    meter: TokenMeter,
    timings: dict[str, float],
    training_peak: int,
    steps: int,
) -> dict[str, Any]:
    trainable, total = count_parameters(model)
    tokens, supervised = plan.tokens
    adapter_bytes = sum(path.stat().st_size for path in result.adapter.glob("*.safetensors"))
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "precision": str(plan.dtype).removeprefix("torch."),
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "data": {
            "rows": len(plan.train),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "held_out_rows": len(plan.held_out),
            "validation_rows": plan.validation,
            "malformed_rows_skipped": [fault.number for fault in plan.faults],
            "long_rows_dropped": plan.too_long,
            "tested_rows_left_out": plan.tested,
            "padding_share": meter.padding_share,
        },
        "training": {
            "steps": steps,
            "effective_batch": plan.effective_batch,
            "tokens_per_second": meter.tokens / timings["train_seconds"],
            "loss": losses.train,
            "held_out_loss": losses.held_out,
            "peak_memory_bytes": training_peak,
        },
        "general_loss": dict(zip(("before", "after"), losses.general, strict=False)),
        "timings": {name: round(seconds, 2) for name, seconds in timings.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "adapter_bytes": adapter_bytes,
        "scores": {
            when: {name: score.summary() for name, score in scores.items()}
            for when, scores in (("before", result.before), ("after", result.after))
            if scores
        },
    }
