"""Does it matter how many inputs an output of an adapter sees, in a long run?

    python -m experiments.inputs_seen --kept runs.jsonl
    python -m experiments.inputs_seen --kept runs.jsonl --names "diagonal blocks,rotated blocks"

An output of a diagonal block sees the inputs of its block. An output of LoRA or MiSS sees all inputs, through a few
sums of them. Here blocks are trained that see sums of all inputs, and sums that are the same for all outputs, with as
many values in every layer, by a recipe of benchmarks/quality. Then problems are solved, and general text is read.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diablo.models.loading import load_model
from diablo.planning.making import make_plan
from diablo.planning.plan import Plan
from diablo.recipes.methods import DiabloMethod
from diablo.recipes.reading import load_recipe
from diablo.scoring.generation import evaluate_task, held_out_loss
from experiments.finetuning import finetune
from experiments.harness import Experiment, Seed, keep_run, kept_runs
from experiments.patterns import Pattern, apply_pattern

QUESTION = "loss, solved problems and forgetting of blocks and sums that see few inputs or all of them"

RATES: Mapping[str, Sequence[float]] = {
    "diagonal blocks": (2e-3,),
    "random rows": (2e-3,),
    "rotated blocks": (1e-3, 2e-3),
    "pooled inputs": (1e-3,),
    "pooled with signs": (1e-3,),
}
"""The best rates of the comparison: DiaBlo's for what has DiaBlo's inputs, MiSS's for sums."""


@torch.no_grad()
def merge_patterns(model: nn.Module) -> float:
    """Add the updates to the weights, and take the patterns away.

    Returns:
        The norm of the updates, as a share of that of the weights that they are added to.
    """
    updates = weights = 0.0
    for path, pattern in [each for each in model.named_modules() if isinstance(each[1], Pattern)]:
        parent, _, kind = path.rpartition(".")
        delta = pattern.dense().to(pattern.base.weight.dtype)
        updates += delta.square().sum().item()
        weights += pattern.base.weight.square().sum().item()
        pattern.base.weight += delta
        setattr(model.get_submodule(parent), kind, pattern.base)
    return float((updates / weights) ** 0.5)


def measure(plan: Plan, name: str, rate: float, seed: int) -> dict[str, float]:
    """Train a pattern, and see what it has learned."""
    method = plan.recipe.method
    assert isinstance(method, DiabloMethod)
    pad_token_id = plan.encoder.tokenizer.pad_token_id
    model: Any = load_model(plan.model_name, plan.dtype, plan.recipe.attention).to(plan.device)
    before = held_out_loss(model, plan.general, pad_token_id)
    apply_pattern(model, name, method.num_blocks, {kind.kind for kind in plan.targets}, seed)
    parameters = sum(each.numel() for each in model.parameters() if each.requires_grad)
    found = finetune(model, plan, rate, warmup=plan.recipe.training.warmup_steps or 0)
    norm = merge_patterns(model)
    scoring = plan.recipe.evaluation
    scores = [
        evaluate_task(model, plan.encoder, task, batch_size=scoring.batch_size, limit=scoring.limit)
        for task, _ in plan.scored
    ]
    return {
        "parameters": parameters,
        "loss": found.held_out_loss,
        "solved": statistics.fmean(score.headline for score in scores),
        "forgetting": held_out_loss(model, plan.general, pad_token_id) - before,
        "relative_norm": norm,
        "seconds": found.seconds,
    }


def run(
    recipe: str = "benchmarks/quality/long-mawps.yaml",
    names: str = ",".join(RATES),
    rates: Mapping[str, Sequence[float]] = RATES,
    seeds: int = 1,
    seed: Seed = 0,
    kept: str = "",
) -> dict[str, Any]:
    """Train patterns at each of their rates, and the best of them with more seeds.

    Args:
        recipe: a recipe of DiaBlo, of a task that is scored.
        names: keys of :data:`RATES`, separated by commas.
        rates: learning rates of each pattern.
        seeds: seeds at the rate with the lowest loss.
        seed: the first seed, which the rates are tried with.
        kept: a file of JSON lines with what each run found, to go on after an interruption with the same settings.
    """
    measured_too = ["data.held_out=test", "evaluation.general=builtin"]
    plans = [make_plan(load_recipe(Path(recipe), [*measured_too, f"seed={seed + number}"])) for number in range(seeds)]
    done = kept_runs(kept)
    found = []
    for name in names.split(","):

        def measured(rate: float, number: int = 0, name: str = name) -> dict[str, Any]:
            key = {"pattern": name, "rate": rate, "seed": seed + number}
            same = [each for each in done if key.items() <= each.items()]
            if not same:
                same = [key | measure(plans[number], name, rate, seed + number)]
                done.extend(same)
                keep_run(kept, same[0])
            print(describe(same[0]), flush=True)
            return same[0]

        swept = [measured(rate) for rate in rates[name]]
        best = min(swept, key=lambda run: run["loss"])
        found.append(
            {
                "pattern": name,
                "sweep": swept,
                "best": [best, *(measured(best["rate"], number) for number in range(1, seeds))],
            }
        )
    return {"patterns": found}


def describe(run: Mapping[str, Any]) -> str:
    """A run in words."""
    return (
        f"{run['pattern']} at {run['rate']:g}, seed {run['seed']}: loss {run['loss']:.4f}, {run['solved']:.1%} solved, "
        f"forgetting {run['forgetting']:+.3f}, {run['relative_norm']:.1%} of the weights"
    )


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Loss and solved problems over forgetting."""
    left, right = figure.subplots(1, 2)
    for each in results["patterns"]:
        forgetting = [run["forgetting"] for run in each["sweep"]]
        left.plot(forgetting, [run["loss"] for run in each["sweep"]], "o-", label=each["pattern"])
        right.plot(forgetting, [100 * run["solved"] for run in each["sweep"]], "o-")
    left.set(ylabel="held-out loss per token (nats)")
    right.set(ylabel="problems solved, %")
    for axes in (left, right):
        axes.set(xlabel="forgetting: rise of the loss on general text")
    left.legend(fontsize="x-small")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for each in results["patterns"]:
        yield from map(describe, [*each["sweep"], *each["best"][1:]])


EXPERIMENT = Experiment("inputs-seen", QUESTION, run, report, draw, size=(10, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
