"""Do blocks learn more in another place, of other sizes, or by another optimizer, at no more time and memory?

    python -m experiments.variants
    python -m experiments.variants --task gsm8k --folder DATA --names "blocks,shifted blocks"

Each variant is trained with the first seed, at rates in steps of two around 1.7e-3, until the best one is inside. If it
is then ahead of the first variant, it is trained with the other seeds too. LoRA is there as a yardstick. The variants
with blocks in other places compute them beside the weights; "blocks beside" does so with the diagonal.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from diablo import DiabloLayer
from diablo.models.loading import count_parameters, load_model
from diablo.planning.plan import Plan
from diablo.recipes.methods import AnyMethod, DiabloMethod, LoraMethod
from diablo.scoring.generation import held_out_loss
from experiments.finetuning import adamw, finetune, load_adapted, plan_data
from experiments.harness import Experiment, Model, Seed, keep_run, kept_runs
from experiments.learning_rate import sweep
from experiments.patterns import Pattern, apply_pattern

QUESTION = "loss of variants of DiaBlo that cost no more, at their best rates"

NUM_BLOCKS = 16
STEP = 0.0625
"""The rate that the sweeps begin at, times the rows of a block: the best one of blocks as they are."""
LORA_RATE = 1e-3

Run = tuple[str, float, int]
"""A variant, the multiple of its rate, and the seed."""


def lion(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Lion: the sign of a momentum."""
    from bitsandbytes.optim import Lion32bit

    made: torch.optim.Optimizer = Lion32bit(groups, betas=(0.9, 0.999))
    return made


def adafactor(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adafactor with a given rate, as the trainers of transformers make it."""
    from transformers.optimization import Adafactor

    made: torch.optim.Optimizer = Adafactor(groups, scale_parameter=False, relative_step=False)
    return made


@dataclass(frozen=True)
class Variant:
    """What differs from DiaBlo with AdamW.

    Attributes:
        method: the method.
        pattern: a key of :data:`experiments.patterns.PATTERNS`, in place of the method.
        optimizer: makes the optimizer.
        warmup: share of the steps in which the rate rises.
        average: decay of an average of the parameters.
    """

    method: AnyMethod = field(default_factory=lambda: DiabloMethod(num_blocks=NUM_BLOCKS))
    pattern: str | None = None
    optimizer: Any = adamw
    warmup: float = 1 / 8
    average: float | None = None


def by_kind(attention: int, mlp: int) -> DiabloMethod:
    """Blocks of other sizes in attention than in the MLP."""
    names = {"q_proj": attention, "k_proj": attention, "v_proj": attention, "up_proj": mlp, "down_proj": mlp}
    return DiabloMethod(num_blocks=attention, block_pattern=names)


LORA = LoraMethod(name="lora", r=21, lora_alpha=42)

VARIANTS = {
    "blocks": Variant(),
    "blocks beside": Variant(pattern="diagonal blocks"),
    "shifted blocks": Variant(pattern="shifted blocks"),
    "interleaved blocks": Variant(pattern="interleaved blocks"),
    "larger in attention": Variant(by_kind(8, 24)),
    "larger in the MLP": Variant(by_kind(32, 14)),
    "dropout": Variant(DiabloMethod(num_blocks=NUM_BLOCKS, dropout=0.05)),
    "decay": Variant(optimizer=partial(torch.optim.AdamW, weight_decay=0.1)),
    "average of steps": Variant(average=0.8),
    "no warm-up": Variant(warmup=0.0),
    "longer warm-up": Variant(warmup=0.5),
    "betas 0.9 and 0.95": Variant(optimizer=partial(torch.optim.AdamW, weight_decay=0.0, betas=(0.9, 0.95))),
    "Lion": Variant(optimizer=lion),
    "Adafactor": Variant(optimizer=adafactor),
    "LoRA": Variant(LORA),
    "LoRA without warm-up": Variant(LORA, warmup=0.0),
    "LoRA with Lion": Variant(LORA, optimizer=lion),
    "LoRA with Adafactor": Variant(LORA, optimizer=adafactor),
}


def groups_of(model: nn.Module, multiple: float) -> list[dict[str, Any]]:
    """The trained parameters with their rates: blocks by their rows, others at a rate for LoRA."""
    rows: dict[nn.Parameter, int] = {}
    for module in model.modules():
        if isinstance(module, DiabloLayer):
            rows |= {blocks: module.diablo_layout[name].block_in for name, blocks in module.diablo_blocks.items()}
        elif isinstance(module, Pattern):
            rows[module.values] = module.layout.block_in
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates = {each: STEP / rows[each] if each in rows else LORA_RATE for each in trained}
    return [
        {"params": [each for each in trained if rates[each] == rate], "lr": multiple * rate}
        for rate in dict.fromkeys(rates.values())
    ]


def adapted(plan: Plan, variant: Variant, seed: int) -> Any:
    """A fresh model with what a variant trains."""
    torch.manual_seed(seed)
    if variant.pattern is None:
        return load_adapted(plan, variant.method)
    model = load_model(plan.model_name, plan.dtype, plan.recipe.attention).to(plan.device)
    return apply_pattern(model, variant.pattern, NUM_BLOCKS, {kind.kind for kind in plan.targets}, seed)


def tuned(plan: Plan, variant: Variant, multiple: float, seed: int) -> float:
    """The held-out loss after training."""
    model = adapted(plan, variant, seed)
    return finetune(
        model,
        plan,
        groups_of(model, multiple),
        warmup=round(variant.warmup * len(plan.sampler.batches())),
        optimizer_of=variant.optimizer,
        average=variant.average,
    ).held_out_loss


def run(
    model: Model = "builtin:smollm2-135m",
    task: str = "mawps",
    folder: str = "",
    names: str = ",".join(VARIANTS),
    rows: int = 192,
    held_out: int = 128,
    seeds: int = 3,
    seed: Seed = 0,
    kept: str = "",
) -> dict[str, Any]:
    """Train variants.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        task: the task.
        folder: where the data of the task is, where it is not in the package.
        names: keys of :data:`VARIANTS`, separated by commas.
        rows: training rows, in batches of 8.
        held_out: test rows for the loss.
        seeds: seeds at the best rate, of the first variant and of those that are ahead of it.
        seed: the first seed.
        kept: a file of JSON lines with the loss of each run, to go on after an interruption with the same settings.
    """
    measured = read_losses(kept)
    plans = [plan_data(model, rows, held_out, 8, NUM_BLOCKS, seed + number, task, folder) for number in range(seeds)]
    found: list[dict[str, Any]] = []
    for name in names.split(","):
        variant = VARIANTS[name]
        start = adapted(plans[0], variant, seed)
        before = held_out_loss(start, plans[0].held_out, plans[0].encoder.tokenizer.pad_token_id)
        parameters = count_parameters(start)[0]

        def loss_at(multiple: float, number: int = 0, name: str = name) -> float:
            run = (name, multiple, seed + number)
            if run not in measured:
                measured[run] = tuned(plans[number], VARIANTS[name], multiple, seed + number)
                keep_run(kept, dict(zip(("variant", "multiple", "seed"), run, strict=True)) | {"loss": measured[run]})
            print(f"{name} at {multiple:g}, seed {seed + number}: {measured[run]:.4f}", flush=True)
            return measured[run]

        swept = sweep(loss_at, before)
        multiple, lowest = min(swept["losses"].items(), key=lambda measured: measured[1])
        losses = [lowest]
        if not found or lowest < found[0]["losses"][0]:
            losses += [loss_at(float(multiple), number) for number in range(1, seeds)]
        found.append(
            {
                "variant": name,
                "parameters": parameters,
                "multiple": float(multiple),
                "losses": losses,
                "before": before,
                "sweep": swept["losses"],
                "best": swept["best"],
            }
        )
    return {"variants": found}


def read_losses(kept: str) -> dict[Run, float]:
    """The losses of runs in a file."""
    return {(each["variant"], each["multiple"], each["seed"]): each["loss"] for each in kept_runs(kept)}


def spread(losses: list[float]) -> float:
    """The sample standard deviation, or zero for a single value."""
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def draw(figure: Any, results: dict[str, Any]) -> None:
    """The loss of each variant with its deviation, and over the rate."""
    left, right = figure.subplots(1, 2)
    variants = results["variants"]
    left.errorbar(
        [statistics.fmean(each["losses"]) for each in variants[::-1]],
        [each["variant"] for each in variants[::-1]],
        xerr=[spread(each["losses"]) for each in variants[::-1]],
        fmt="o",
        capsize=3,
    )
    left.axvline(statistics.fmean(variants[0]["losses"]), color="grey", linewidth=0.5)
    left.set(xlabel="held-out loss per token (nats)")
    for number, each in enumerate(variants):
        rates = [float(rate) for rate in each["sweep"]]
        # There are ten colours.
        right.plot(rates, each["sweep"].values(), "o-" if number < 10 else "s--", label=each["variant"])
    right.set_xscale("log", base=2)
    right.set(xlabel=f"rate x rows / {STEP:g}", ylabel="held-out loss, first seed")
    right.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    plain = results["variants"][0]
    for each in results["variants"]:
        gains = [loss - other for loss, other in zip(each["losses"], plain["losses"], strict=False)]
        yield (
            f"{each['variant']:20} {each['parameters']:,} parameters, at {each['multiple']:g}: "
            f"{statistics.fmean(each['losses']):.4f} ± {spread(each['losses']):.4f}; against {plain['variant']} "
            f"{statistics.fmean(gains):+.4f} ± {spread(gains):.4f}"
        )


EXPERIMENT = Experiment("variants", QUESTION, run, report, draw, size=(14, 5))

if __name__ == "__main__":
    EXPERIMENT.main()
