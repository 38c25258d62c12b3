"""A recipe of ``diablo train`` on a model that no single device can hold: a training loop to start from.

    torchrun --nproc_per_node 4 examples/sharded_training.py recipe.yaml --shard tensor
    torchrun --nproc_per_node 4 examples/sharded_training.py recipe.yaml --shard fsdp output=runs/sharded

``tensor`` cuts the layers as the model's tensor-parallel plan says, and every process sees every row; ``fsdp`` shards
weights and blocks by FSDP2, and each process takes ``batch_size`` rows a step, as in ``diablo train`` under torchrun.
Rows, batches, loss, schedule and the adapter that comes out are those of ``diablo train`` with as many rows a step.
What is around the training, checkpoints and scores, is left out: score the adapter with ``diablo evaluate``. Each
process of ``fsdp`` reads the whole model into the memory of its machine before it keeps its share.
"""

from __future__ import annotations

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.distributed import DistributedConfig

from diablo.data.batching import collate
from diablo.planning.making import make_plan
from diablo.planning.plan import Plan
from diablo.recipes.applying import apply_method
from diablo.recipes.reading import load_recipe
from diablo.scoring.losses import summed_completion_loss
from diablo.training.engines import check_shardable


class Shard(StrEnum):
    """How the model is spread over the processes."""

    tensor = "tensor"
    fsdp = "fsdp"


def load(plan: Plan, shard: Shard) -> Any:
    """The adapted model, spread over the processes."""
    torch.manual_seed(plan.recipe.seed)
    count = distributed.get_world_size()
    settings = {"distributed_config": DistributedConfig(tp_size=count)} if shard is Shard.tensor else {}
    model = AutoModelForCausalLM.from_pretrained(plan.model_name, dtype=plan.dtype, **settings)
    model = apply_method(model, plan.recipe.method)
    if shard is Shard.fsdp:
        mesh = distributed.init_device_mesh(plan.device.type, (count,))
        for layer in [module for module in model.modules() if type(module).__name__ in model._no_split_modules]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model.train()


def share(plan: Plan, sequences: list[int], shard: Shard) -> tuple[dict[str, torch.Tensor], float]:
    """This process's part of a step's sequences as a batch, and what its summed loss counts for in the step's."""
    weight = 1 / sum(row.supervised for sequence in sequences for row in plan.rows_of(sequence))
    if shard is Shard.fsdp:
        rank, count = distributed.get_rank(), distributed.get_world_size()
        # FSDP averages the gradients. A process without a sequence of its own computes along with others.
        weight = weight * count if sequences[rank::count] else 0.0
        sequences = sequences[rank::count] or sequences[:1]
    batch = collate([plan.features_of(sequence) for sequence in sequences], plan.encoder.tokenizer.pad_token_id)
    return {name: values.to(plan.device) for name, values in batch.items()}, weight


def train(model: Any, plan: Plan, shard: Shard) -> None:
    """Train as the recipe says."""
    training = plan.recipe.training
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": parameters, "weight_decay": training.weight_decay}]
    optimizer = plan.optimizer.kind(groups, **plan.optimizer.arguments)
    schedule = get_scheduler(
        plan.schedule.name,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=plan.steps,
        scheduler_specific_kwargs=dict(plan.schedule.options),
    )
    lowered = torch.autocast(plan.device.type, plan.dtype) if plan.dtype == torch.bfloat16 else contextlib.nullcontext()
    step = 0
    while step < plan.steps:
        for sequences in plan.sampler.batches():
            batch, weight = share(plan, sequences, shard)
            with lowered:
                loss = summed_completion_loss(model, batch, label_smoothing=training.label_smoothing) * weight
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % training.logging_steps == 0:
                report(loss.detach(), step, plan.steps)
            if step == plan.steps:
                return
        plan.sampler.set_epoch(plan.sampler.epoch + 1)


def report(loss: torch.Tensor, step: int, steps: int) -> None:
    """Print the loss of a step: the mean over the processes, which under tensor parallelism have the same."""
    distributed.all_reduce(loss)
    if distributed.get_rank() == 0:
        print(f"step {step} of {steps}: loss {loss.item() / distributed.get_world_size():.4f}", flush=True)


def save(model: Any, folder: Path) -> None:
    """Write the whole adapter, once."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
        print(f"Wrote {folder}.")


def main(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    shard: Annotated[Shard, typer.Option(help="How the model is spread over the processes.")] = Shard.tensor,
) -> None:
    """Train a recipe's adapter on a model that is spread over the processes."""
    distributed.init_process_group()
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(distributed.get_node_local_rank())
    # Cut, the processes are one model, and have the same rows.
    plan = make_plan(load_recipe(recipe, overrides or []), replicas=1 if shard is Shard.tensor else None)
    if plan.recipe.training.gradient_accumulation > 1:
        raise typer.BadParameter("gradient_accumulation must be 1: raise batch_size.")
    check_shardable(plan)
    if plan.recipe.training.depends_on_held_out or plan.recipe.training.neftune_noise_alpha:
        raise typer.BadParameter(
            "this loop has no held-out loss and no noise: leave out keep, early stopping, neftune."
        )
    model = load(plan, shard)
    train(model, plan, shard)
    save(model, plan.recipe.output / "adapter")
    distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
