"""A run: check, train, save, score, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import set_seed

from diablo.data.batching import collate, collate_rows
from diablo.data.packing import join
from diablo.data.special_text import describe_special_text
from diablo.devices import peak_memory_bytes
from diablo.errors import Interrupted
from diablo.merging import merge_adapter
from diablo.models.adapters import load_values
from diablo.models.checkpointing import checkpointing_options, enable_checkpointing
from diablo.models.compiling import compiled_layers
from diablo.models.folders import adapter_folder
from diablo.models.forms import IMAGE_TEXT, form_of
from diablo.models.liger import apply_liger
from diablo.models.loading import is_placed, is_quantized_model, load_model
from diablo.models.saving import save_adapter
from diablo.models.vocabulary import give_rows
from diablo.planning import preflight
from diablo.planning.making import make_plan
from diablo.planning.materials import Materials
from diablo.planning.plan import Plan
from diablo.planning.rates import rate_far_above, with_learning_rate
from diablo.publishing.card import Kind, write_run_card
from diablo.publishing.hub import Upload, check_upload, upload_result
from diablo.recipes.applying import apply_method
from diablo.recipes.methods import FullMethod
from diablo.recipes.recipe import Recipe
from diablo.records.formats import FORMAT_KEY, RUN_FORMAT
from diablo.records.log import LOGGER, RunLog, say
from diablo.records.progress import TokenMeter
from diablo.records.results import describe_machine, describe_versions
from diablo.scoring.generation import Score
from diablo.scoring.several_tasks import score_tasks, write_answers
from diablo.training import saving
from diablo.training.engines import Engine, check_shardable
from diablo.training.measuring import Losses
from diablo.training.output import Start, check_effective_batch, check_rewards, close_output, start_output
from diablo.training.processes import Processes
from diablo.training.safeguards import StopWhenAsked, out_of_memory_advice

if TYPE_CHECKING:
    from diablo.training.trainers.base import RunTrainer


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
        upload: what was uploaded to the hub, where the recipe asks for that.
        upload_fault: why that failed; None where it did not.
    """

    folder: Path
    adapter: Path
    merged: Path | None = None
    before: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    upload: Upload | None = None
    upload_fault: str | None = None

    def paths(self) -> dict[str, str | None]:
        """Where the run's things are, by the names of the attributes."""
        merged = None if self.merged is None else str(self.merged)
        return {"folder": str(self.folder), "adapter": str(self.adapter), "merged": merged}


def carry_out(recipe: Recipe, materials: Materials, start_from: Start, console: Console) -> RunResult:
    """Carry out a recipe whose data is read and whose output folder is checked; see :func:`diablo.training.train`.

    Args:
        recipe: the recipe.
        materials: what was read for it.
        start_from: the checkpoint to go on from, if any.
        console: where progress is written.

    Raises:
        UserError: as :func:`diablo.training.train`.
        Interrupted: likewise.
    """
    processes = Processes()
    console = processes.console(console)
    with RunLog(console, enabled=processes.is_main) as log:
        for line in start_from.describe():
            say(console, line)
        with processes.main_first():
            check_upload(recipe.push_to_hub if processes.is_main else None)
            plan = make_plan(recipe, materials=materials)
        _say_plan(plan, console, start_from.checkpoint)
        _check_processes(processes, plan, start_from.checkpoint)
        return _carry_out(plan, processes, console, log, start_from.checkpoint)


def _carry_out(plan: Plan, processes: Processes, console: Console, log: RunLog, checkpoint: Path | None) -> RunResult:
    # TRL takes seconds to import, and nothing that can be refused before is to wait for it.
    from diablo.training.trackers import Trackers
    from diablo.training.trainers.making import make_trainer

    recipe, resume = plan.recipe, checkpoint is not None
    trackers = Trackers(recipe, resume=resume)
    if processes.is_main:
        trackers.check()
    set_seed(recipe.seed)
    is_full = isinstance(recipe.method, FullMethod)
    model, load_seconds = _load(plan, processes.engine)
    timings = {"load_seconds": load_seconds}
    plan = _settle_learning_rate(plan, model, console)

    adapter_start = start_output(processes, recipe, model, log, resume=resume)
    result = RunResult(recipe.output, recipe.output / ("model" if is_full else "adapter"))
    losses, meter, asking = Losses(), TokenMeter(), StopWhenAsked(console)

    with trackers.environment():
        trainer = make_trainer(model, plan, processes.engine, console, meter, losses, asking, trackers)

        def measure_before() -> None:
            if recipe.evaluation.before:
                result.before = _score(model, plan, console, "before", write=processes.is_main)
            losses.measure_general(model, plan)
            trainer.prepare_for_rows()
            trainer.held_out.measure_start()

        if not processes.engine.shards:
            measure_before()
        _check_first_batch(trainer, plan)
        trainer.when_sharded = meter.pause()(measure_before)
        start = time.perf_counter()
        _train(trainer, plan, asking, checkpoint)
    meter.tokens, meter.padded = processes.total(meter.tokens), processes.total(meter.padded)
    timings["train_seconds"] = time.perf_counter() - start - meter.paused_seconds
    training_peak = peak_memory_bytes()
    kept_step = trainer.held_out.settle(model, trainer.state.global_step)
    losses.measure_general(model, plan)
    logged = trainer.state.log_history
    losses.train = [(int(log["step"]), log["loss"]) for log in logged if "loss" in log]
    losses.rewards = [(int(log["step"]), log["reward"]) for log in logged if "reward" in log]

    trained = processes.engine.trained(model)
    if processes.is_main:
        with saving.writing(recipe.output):
            save_adapter(
                model,
                plan.encoder.tokenizer,
                result.adapter,
                start=adapter_start,
                trained=trained,
                stops=plan.encoder.stop_token_ids,
                source=plan.model_name,
                vectors=plan.vectors,
            )
    if recipe.evaluation.after:
        result.after = _score(model, plan, console, "after", write=processes.is_main)
    if processes.is_main:
        if recipe.merge and not is_full:
            result.merged = recipe.output / "merged"
            # The run is not recorded yet.
            merge_adapter(result.adapter, result.merged, trained_as=recipe.model_dump(mode="json"))
        result.record = _record(plan, model, result, losses, meter, timings, training_peak, trainer, kept_step)
        _close(recipe, result, losses, "model" if is_full else "adapter")
        LOGGER.info("done: %s, trained in %.0f s", result.adapter, timings["train_seconds"])
    processes.wait()
    return result


def _close(recipe: Recipe, result: RunResult, losses: Losses, kind: Kind) -> None:
    """Write the model cards and the record, and upload the result where the recipe asks for that."""
    with saving.writing(recipe.output):
        write_run_card(result.adapter, result.record, kind)
        if result.merged is not None:
            write_run_card(result.merged, result.record, "merged")
        close_output(recipe, result.record, losses)
    # The run is whole and recorded by now, whatever becomes of the upload.
    result.upload, result.upload_fault = upload_result(recipe.push_to_hub, result.adapter, kind)


def _say_plan(plan: Plan, console: Console, checkpoint: Path | None) -> None:
    recipe, versions = plan.recipe, describe_versions()
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    LOGGER.info("%s on %s, into %s", recipe.method.title, recipe.model, recipe.output)
    LOGGER.info("versions            %s", installed)
    for line in (*plan.objective_lines(), *plan.data_lines()):
        LOGGER.info(line)
    dtype = str(plan.dtype).removeprefix("torch.")
    batch = plan.effective_batch_in_words
    LOGGER.info("steps               %d of %s, in %s on %s", plan.steps, batch, dtype, plan.device)
    if checkpoint is not None:
        LOGGER.info("goes on from %s", checkpoint.name)
    if recipe.merge and isinstance(recipe.method, FullMethod):
        whole = f"full fine-tuning writes a whole model, {recipe.output / 'model'}"
        console.print(f"merge: there is nothing to merge; {whole}.", markup=False, soft_wrap=True)
    if plan.prompts_before:
        console.print(f"adapter: {plan.prompts_before}.", markup=False, soft_wrap=True)
    if (counts := plan.token_counts) is not None and counts.absent:
        console.print(f"new_tokens: {counts.absent}.", markup=False, soft_wrap=True)
    if run_together := plan.run_together:
        console.print(f"data: {run_together}.", markup=False, soft_wrap=True)
    if long_warmup := plan.long_warmup:
        console.print(f"training.warmup_steps: {long_warmup}.", markup=False, soft_wrap=True)
    spelling, tokens = plan.special_text
    if spelling:
        console.print(f"data: {describe_special_text(spelling, tokens, recipe.data.special_text)}", markup=False)


def _load(plan: Plan, engine: Engine) -> tuple[Any, float]:
    """The model with the method applied, and the seconds that this took.

    It is where it is to be trained, or on the CPU if it is to be sharded.
    """
    start, recipe = time.perf_counter(), plan.recipe
    # Full fine-tuning needs fp32 weights, or small updates are lost to rounding; autocast lowers the products.
    dtype = torch.float32 if isinstance(recipe.method, FullMethod) else plan.dtype
    config = None if plan.head is None else plan.config
    model = load_model(plan.model_name, dtype, recipe.attention, recipe.quantization, config=config, seed=recipe.seed)
    if recipe.speed.liger:
        apply_liger(model)
    model = apply_method(give_rows(model, plan.trained_tokens), recipe.method, plan.trained_tokens)
    if recipe.adapter is not None:
        load_values(model, adapter_folder(recipe.adapter), plan.model_name)
    if not (is_placed(model) or engine.shards):
        model = model.to(plan.device)
    return model, time.perf_counter() - start


def _settle_learning_rate(plan: Plan, model: Any, console: Console) -> Plan:
    """The plan with a number for the learning rate, which is said where it was found in the weights."""
    settled = with_learning_rate(plan, model)
    if settled is not plan:
        length = f"{plan.steps} steps of {plan.recipe.objective.name}"
        rate = settled.recipe.training.rate
        say(console, f"learning rate: {rate:g}, found in the weights for these blocks and {length}")
    elif (suited := rate_far_above(plan, model)) is not None:
        say(
            console,
            f"learning rate: {plan.recipe.training.rate:g}, where {suited:g} would suit these blocks "
            "(training.learning_rate: auto); such a low one learns slowly",
        )
    return settled


def _check_first_batch(trainer: RunTrainer, plan: Plan) -> None:
    model: Any = trainer.model
    preflight.check_trainable(model)
    pad_token_id, first = plan.encoder.tokenizer.pad_token_id, plan.sampler.batches()[0]
    rows = [each for sequence in first for row in plan.rows_of(sequence) for each in row.sequences]
    packed = plan.recipe.training.packing
    if plan.rewards is None:
        batch = collate(
            [plan.features_of(index) for index in first] if packed else [row.features for row in rows], pad_token_id
        )
        if plan.head is None:
            preflight.check_stop_tokens(rows, batch, plan.encoder.stop_token_ids)
    else:
        # A prompt in the place of the completions, which are not there yet.
        rows = [replace(row, labels=row.input_ids) for row in rows]
    # A row with images reaches whatever is trained of what sees them.
    shortest = min(rows, key=lambda row: (not row.images, len(row.input_ids)))
    probe = collate_rows([shortest], pad_token_id, plan.encoder.images)
    options = checkpointing_options(plan.recipe.training.gradient_checkpointing)
    model.train()
    if options is not None:
        enable_checkpointing(model, options)
    moved = {name: values.to(model.device) for name, values in probe.items()}
    lowered = torch.autocast(model.device.type, dtype=plan.dtype, enabled=plan.dtype != torch.float32)
    with lowered, _attention_of(model.device, model):
        preflight.check_gradients(model, moved, checkpointing=options is not None, has_head=plan.head is not None)
        if packed:
            twice = collate([join([shortest, shortest])], pad_token_id)
            preflight.check_packing(model, {name: values.to(model.device) for name, values in twice.items()})


@contextmanager
def _attention_of(device: torch.device, model: Any) -> Generator[None]:
    """Attention that the device can do: a model that is to be sharded waits on the CPU, without that of its GPUs."""
    chosen = model.config._attn_implementation
    if device.type != "cpu" or chosen == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def _score(model: Any, plan: Plan, console: Console, when: str, *, write: bool) -> dict[str, Score]:
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
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            LOGGER.info("%s %s %s %.1f%% (%d of %d)", name, metric, when, 100 * value, score.right, len(score.answers))
    if write:
        with saving.writing(plan.recipe.output):
            write_answers(plan.recipe.output / f"answers-{when}.jsonl", scores.values())
    return scores


def _train(trainer: RunTrainer, plan: Plan, asking: StopWhenAsked, checkpoint: Path | None) -> None:
    """Run the trainer, until it is done, something goes wrong or somebody asks it to stop."""
    if checkpoint is not None and trainer.take_over(checkpoint, plan.steps):
        return
    waiting = asking if trainer.accelerator.num_processes == 1 else nullcontext()
    model: Any = trainer.model
    try:
        with waiting, compiled_layers(model) if plan.recipe.speed.compile else nullcontext():
            # What was measured before may have drawn numbers. And of a prompt that several processes complete, each is
            # to sample its own completions.
            set_seed(plan.recipe.seed + (trainer.accelerator.process_index if plan.rewards else 0))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        advice = out_of_memory_advice(error, plan.recipe, plan.longest)
        if advice is None:
            raise
        raise advice from error
    finally:
        trainer.progress.close()
    if asking.asked is not None:
        folder = plan.recipe.output
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is saved. Go "
            f"on with: diablo train {folder / 'recipe.yaml'} --resume",
            asking.asked,
        )


def _check_processes(processes: Processes, plan: Plan, checkpoint: Path | None) -> None:
    """Check that the processes can train, and save, what the plan says, and go on with what the checkpoint has."""
    if checkpoint is not None:
        check_effective_batch(plan, processes.count, checkpoint)
        check_rewards(plan, checkpoint)
    if processes.engine.shards:
        check_shardable(plan)


def _record(
    plan: Plan,
    model: Any,
    result: RunResult,
    losses: Losses,
    meter: TokenMeter,
    timings: dict[str, float],
    training_peak: int,
    trainer: RunTrainer,
    kept_step: int,
) -> dict[str, Any]:
    # The model's own tensors would not tell: quantized weights are packed, and DeepSpeed has its own in parts.
    trainable, total = plan.parameters
    adapter_bytes = sum(path.stat().st_size for path in result.adapter.glob("*.safetensors"))
    return {
        FORMAT_KEY: RUN_FORMAT,
        "recipe": plan.recipe.model_dump(mode="json"),
        "versions": describe_versions(),
        "machine": describe_machine(),
        "precision": str(plan.dtype).removeprefix("torch."),
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "trained_tokens": plan.token_counts and plan.token_counts.record(),
        "sees_images": form_of(plan.config) is IMAGE_TEXT,
        "quantized_base": is_quantized_model(plan.config, plan.recipe.quantization),
        "data": plan.data_record() | {"padding_share": meter.padding_share},
        "training": {
            "optimizer": plan.optimizer.describe(),
            "schedule": plan.schedule.describe(),
            "steps": trainer.state.global_step,
            "stopped_early": trainer.state.global_step < plan.steps,
            "kept_step": kept_step,
            "processes": trainer.accelerator.num_processes,
            "engine": trainer.accelerator.distributed_type.value,
            "parameters_kept": trainer.parameters_kept,
            "effective_batch": plan.effective_batch,
            "tokens_per_second": meter.tokens / timings["train_seconds"],
            "loss": losses.train,
            "reward": losses.rewards,
            "rewards": plan.rewards.record() if plan.rewards else [],
            "skipped_steps": trainer.finite.skipped,
            "held_out_loss": losses.held_out,
            "loss_unit": plan.recipe.objective.loss_unit,
            "encoder_decoder": plan.encoder.encoder_decoder,
            "head": plan.head and {**asdict(plan.head), "was_new": not plan.has_own_head},
            "held_out_figures": losses.figures,
            "validation_score": losses.scores,
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
