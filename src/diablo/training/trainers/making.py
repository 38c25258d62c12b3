"""The trainer of a plan: its arguments, and what is made beside it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from diablo.devices import can_pin_memory
from diablo.models.checkpointing import checkpointing_options
from diablo.planning.plan import Plan
from diablo.records.progress import TokenMeter, TrainingProgress
from diablo.training.averaging import Average
from diablo.training.engines import DeepSpeed, Engine
from diablo.training.measuring import HeldOutLoss, Losses
from diablo.training.safeguards import FiniteLosses
from diablo.training.trackers import Trackers
from diablo.training.tracking import LastLoss, TrainLog
from diablo.training.trainers.base import RunTrainer
from diablo.training.trainers.groups import GroupTrainer
from diablo.training.trainers.heads import LabelTrainer, RewardModelTrainer
from diablo.training.trainers.preferences import JudgedTrainer, OddsRatioTrainer, PairTrainer
from diablo.training.trainers.supervised import CompletionTrainer, adapted_head_allowed
from diablo.training.trainers.vectors import VectorTrainer

_TRAINERS: dict[str, Any] = {
    "sft": CompletionTrainer,
    "dpo": PairTrainer,
    "orpo": OddsRatioTrainer,
    "kto": JudgedTrainer,
    "grpo": GroupTrainer,
    "classification": LabelTrainer,
    "regression": LabelTrainer,
    "reward": RewardModelTrainer,
    "token_classification": LabelTrainer,
    "embedding": VectorTrainer,
}


def make_trainer(
    model: Any,
    plan: Plan,
    engine: Engine,
    console: Console,
    meter: TokenMeter,
    losses: Losses,
    asking: TrainerCallback,
    trackers: Trackers,
) -> RunTrainer:
    """The trainer of a plan.

    Args:
        model: the adapted model, whole.
        engine: how the processes are to hold it.
        plan: the plan.
        console: where progress is written.
        meter: counts tokens.
        losses: where held-out losses are written to.
        asking: told of every step before anything is checked, logged or saved.
        trackers: those that the run is told to.
    """
    training, kind = plan.recipe.training, _TRAINERS[plan.recipe.objective.name]
    on_cpu = plan.device.type == "cpu"
    config = kind.config_class(
        output_dir=str(plan.recipe.output / "checkpoints"),
        learning_rate=training.rate,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        lr_scheduler_type=plan.schedule.name,
        lr_scheduler_kwargs=dict(plan.schedule.options),
        neftune_noise_alpha=training.neftune_noise_alpha,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=training.gradient_checkpointing != "none",
        gradient_checkpointing_kwargs=checkpointing_options(training.gradient_checkpointing),
        logging_steps=training.logging_steps,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        save_total_limit=training.save_total_limit,
        bf16=plan.dtype == torch.bfloat16,
        fp16=plan.dtype == torch.float16,
        use_cpu=on_cpu and not isinstance(engine, DeepSpeed),
        ddp_backend="gloo" if on_cpu and isinstance(engine, DeepSpeed) else None,
        seed=plan.recipe.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=can_pin_memory(plan.device),
        # Its filter asks the device in each step whether the loss is finite.
        logging_nan_inf_filter=False,
        # That every trained parameter gets a gradient is checked before the first step.
        ddp_find_unused_parameters=False,
        report_to=plan.recipe.tracking.report_to or "none",
        run_name=plan.recipe.tracking.name or plan.recipe.output.name,
        # Trackio's; the others are told of it by the environment.
        project=plan.recipe.tracking.project or "huggingface",
        disable_tqdm=True,
        # Not all of TRL's trainers have it.
        **({"activation_offloading": True} if plan.recipe.speed.activation_offloading else {}),
        **kind.settings(plan),
    )
    config.recipe = plan.recipe.model_dump(mode="json")
    # It is what trackers are told. When they are made, the arguments take transformers' own names alone.
    config.optim = plan.optimizer.name
    # Several GPUs are for several processes: in one, torch's DataParallel would copy the model to each in each step.
    config._n_gpu = min(config.n_gpu, 1)
    progress = TrainingProgress(console, meter)
    finite = FiniteLosses(training.on_nonfinite, can_look=not engine.shards)
    average = Average(training.ema, finite)
    held_out = HeldOutLoss(plan, meter, losses, average, engine)
    # TRL rounds what is trained over weights of bitsandbytes to bf16; it stays as it is here.
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    with adapted_head_allowed(model) if kind is CompletionTrainer else nullcontext():
        trainer: RunTrainer = kind(
            plan=plan,
            progress=progress,
            finite=finite,
            average=average,
            held_out=held_out,
            train_log=TrainLog(plan.recipe.output, meter, losses),
            trackers=trackers,
            engine=engine,
            model=model,
            args=config,
            train_dataset=Dataset.from_list(kind.columns(plan)),
            processing_class=plan.encoder.tokenizer,
            data_collator=kind.collator(plan, meter),
            optimizer_cls_and_kwargs=(plan.optimizer.kind, dict(plan.optimizer.arguments)),
            # Where the held-out loss ends training, the last steps' losses are looked at as well.
            callbacks=[progress, asking, average, held_out, finite, LastLoss()],
        )
    for parameter, values in trained:
        parameter.data = values
    held_out.report, held_out.figures = trainer.log, trainer.held_out_figures
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer
