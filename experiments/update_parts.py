"""What does the update of full fine-tuning have that diagonal blocks lack?

    python -m experiments.update_parts
    python -m experiments.update_parts --task gsm8k --folder DATA

A model is fine-tuned whole. Then parts of its update are put into the base model, one at a time, and the loss is
measured: the diagonal blocks, as they are and made larger, the best update of a low rank, and others of equal size.
Beside that stands what blocks and a low rank reach when they are trained themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from diablo import BlockLayout
from diablo.planning.plan import Plan
from diablo.recipes.methods import AnyMethod, DiabloMethod, FullMethod, LoraMethod
from diablo.scoring.generation import held_out_loss
from experiments.finetuning import finetune, load_adapted, plan_data
from experiments.harness import Experiment, Model, Seed
from experiments.learning_rate import KINDS

QUESTION = "the loss with parts of full fine-tuning's update, and with blocks and a low rank that are trained"

RATES = {"full": (5e-5, 1e-4, 2e-4), "diablo": (1.7e-3, 3.5e-3, 7e-3), "lora": (1e-3, 2e-3, 4e-3)}
SCALES = (1.0, 2.0, 4.0, 8.0)

Update = dict[str, torch.Tensor]
Part = Callable[[torch.Tensor], torch.Tensor]


def diagonal(delta: torch.Tensor, num_blocks: int, scale: float = 1.0) -> torch.Tensor:
    """The diagonal blocks of an update of shape (out, in), times a scale; zeros elsewhere."""
    kept = torch.zeros_like(delta)
    for tile in BlockLayout(delta.shape[1], delta.shape[0], num_blocks).tiles:
        tile.of_weight(kept).copy_(scale * tile.of_weight(delta))
    return kept


def low_rank(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The closest matrix of a rank."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def largest(delta: torch.Tensor, count: int) -> torch.Tensor:
    """The largest entries; zeros elsewhere."""
    smallest = delta.abs().flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= smallest, delta, 0)


def parts_of(num_blocks: int, rank: int) -> dict[str, Part]:
    """The parts of an update that are tried, each of as many parameters as the blocks, but for the first and last."""
    return {
        "the adapted layers, whole": lambda delta: delta,
        f"their rank {rank}": lambda delta: low_rank(delta, rank),
        "their largest entries": lambda delta: largest(delta, delta.numel() // num_blocks),
        **{f"their diagonal x {scale:g}": partial(diagonal, num_blocks=num_blocks, scale=scale) for scale in SCALES},
        "all but their diagonal": lambda delta: delta - diagonal(delta, num_blocks),
    }


def is_target(name: str) -> bool:
    """Whether a parameter is the weight of a layer that DiaBlo adapts."""
    return name.rpartition(".")[0].rpartition(".")[2] in KINDS and name.endswith(".weight")


def lowered(plan: Plan) -> torch.autocast:
    """The precision of the plan, for weights in fp32 that change within it, whose casts must therefore not be kept."""
    return torch.autocast(plan.device.type, torch.bfloat16, plan.dtype == torch.bfloat16, cache_enabled=False)


def loss_of(model: nn.Module, plan: Plan) -> float:
    """The held-out loss."""
    with lowered(plan):
        return held_out_loss(model, plan.held_out, plan.encoder.tokenizer.pad_token_id)


@torch.no_grad()
def loss_with(model: nn.Module, base: Update, update: Update, plan: Plan) -> float:
    """The held-out loss of the base model with an update; parameters that it does not name are the base's."""
    for name, parameter in model.named_parameters():
        parameter.copy_(base[name] + update[name] if name in update else base[name])
    return loss_of(model, plan)


def fine_tuned(plan: Plan, method: AnyMethod, rates: Sequence[float]) -> tuple[Any, float, dict[str, float]]:
    """The model with the lowest held-out loss over learning rates, its loss, and the loss of each rate."""
    best, swept = None, {}
    whole = isinstance(method, FullMethod)
    for rate in rates:
        model = load_adapted(plan, method, torch.float32 if whole else None)
        with lowered(plan) if whole else nullcontext():
            swept[f"{rate:g}"] = finetune(model, plan, rate).held_out_loss
        print(f"{method.name} at {rate:g}: {swept[f'{rate:g}']:.4f}", flush=True)
        if swept[f"{rate:g}"] == min(swept.values()):
            best = model
    return best, min(swept.values()), swept


def run(
    model: Model = "builtin:smollm2-135m",
    task: str = "mawps",
    folder: str = "",
    rows: int = 192,
    held_out: int = 128,
    num_blocks: int = 16,
    rank: int = 21,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Fine-tune whole, and measure parts of the update.

    Args:
        model: a folder, a hub id or ``builtin:NAME``, of a Llama.
        task: the task.
        folder: where the data of the task is, where it is not in the package.
        rows: training rows, in batches of 8.
        held_out: test rows for the loss.
        num_blocks: N.
        rank: of as many parameters.
        seed: seed of the order of the rows.
    """
    plan = plan_data(model, rows, held_out, 8, num_blocks, seed, task, folder)
    trained: dict[str, dict[str, float]] = {}
    methods: dict[str, AnyMethod] = {
        "diablo": DiabloMethod(num_blocks=num_blocks),
        "lora": LoraMethod(name="lora", r=rank, lora_alpha=2 * rank),
    }
    for name, method in methods.items():
        trained[name] = fine_tuned(plan, method, RATES[name])[2]
    whole, reached, trained["full"] = fine_tuned(plan, FullMethod(name="full"), RATES["full"])
    frozen = load_adapted(plan, FullMethod(name="full"), torch.float32)
    base = {name: parameter.detach() for name, parameter in frozen.named_parameters()}
    update = {name: parameter.detach() - base[name] for name, parameter in whole.named_parameters()}
    targets = {name: delta for name, delta in update.items() if is_target(name)}
    others = {name: delta for name, delta in update.items() if name not in targets}
    energy = sum(delta.square().sum().item() for delta in targets.values())
    losses = {"nothing": loss_with(whole, base, {}, plan), "all weights": reached}
    losses["all but the adapted layers"] = loss_with(whole, base, others, plan)
    shares = {}
    for name, part in parts_of(num_blocks, rank).items():
        kept = {each: part(delta) for each, delta in targets.items()}
        losses[name] = loss_with(whole, base, kept, plan)
        shares[name] = sum(delta.square().sum().item() for delta in kept.values()) / energy
        print(f"{name}: {losses[name]:.4f}, {shares[name]:.1%} of the energy", flush=True)
    return {"losses": losses, "energy": shares, "trained": trained}


def gained(results: dict[str, Any], loss: float) -> float:
    """What a loss gains, as a share of what full fine-tuning gains."""
    losses = results["losses"]
    return float((losses["nothing"] - loss) / (losses["nothing"] - losses["all weights"]))


def draw(figure: Any, results: dict[str, Any]) -> None:
    """The share of full fine-tuning's gain that each part has, and each trained method."""
    bars = {name: gained(results, loss) for name, loss in results["losses"].items() if name != "nothing"}
    bars |= {f"{name}, trained": gained(results, min(swept.values())) for name, swept in results["trained"].items()}
    axes = figure.subplots()
    axes.barh(list(bars)[::-1], [100 * share for share in bars.values()][::-1])
    axes.set(xlabel="of the loss that full fine-tuning gains, %")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for name, loss in results["losses"].items():
        share = results["energy"].get(name)
        energy = "" if share is None else f", {share:.1%} of the energy"
        yield f"{name}: {loss:.4f}, {gained(results, loss):.1%} of the gain{energy}"
    for name, swept in results["trained"].items():
        loss = min(swept.values())
        yield f"{name}, trained: {loss:.4f}, {gained(results, loss):.1%} of the gain, {swept}"


EXPERIMENT = Experiment("update-parts", QUESTION, run, report, draw, size=(9, 5))

if __name__ == "__main__":
    EXPERIMENT.main()
