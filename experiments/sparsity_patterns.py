"""Does it matter which entries of a weight are trained, at equal numbers of them?

    python -m experiments.sparsity_patterns

The paper's ablation: diagonal blocks against random blocks, entries, columns and rows. Each pattern is trained on word
problems at several learning rates, and at its best rate from several seeds, which draw other entries and another order
of the rows. Reported are the loss on held-out rows, the seconds of training, and the bytes that a step keeps for its
backward.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from diablo.models.loading import count_parameters, load_model
from diablo.planning.kept import kept_for_backward
from diablo.planning.plan import Plan
from experiments.finetuning import Trajectory, batch_of, completion_loss, finetune, plan_data
from experiments.harness import Experiment, Model, Seed
from experiments.patterns import apply_pattern

QUESTION = "loss, time and memory of patterns of trained entries at equal numbers of them"

COMPARED = ("diagonal blocks", "random blocks", "random entries", "random columns", "random rows")
RATES = (3e-3, 1e-2, 3e-2)


def train(plan: Plan, pattern: str, num_blocks: int, rate: float, seed: int) -> tuple[Trajectory, int, int]:
    """Train a pattern; its trajectory, its trained parameters, and the bytes that its largest batch keeps."""
    model = load_model(plan.model_name, plan.dtype, plan.recipe.attention).to(plan.device)
    apply_pattern(model, pattern, num_blocks, {kind.kind for kind in plan.targets}, seed)
    longest = max(plan.sampler.batches(), key=lambda batch: max(plan.sampler.lengths[index] for index in batch))
    kept = kept_for_backward(lambda: completion_loss(model.train(), batch_of(plan, longest)))
    return finetune(model, plan, rate), count_parameters(model)[0], kept


def run(
    model: Model = "builtin:smollm2-135m",
    num_blocks: int = 64,
    rows: int = 256,
    held_out: int = 128,
    rates: tuple[float, ...] = RATES,
    seeds: int = 3,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Train every pattern.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        num_blocks: N.
        rows: training rows, in batches of 8.
        held_out: test rows.
        rates: learning rates, tried with the first seed.
        seeds: seeds at the best rate.
        seed: the first seed.
    """
    plans = [plan_data(model, rows, held_out, 8, num_blocks, seed + number) for number in range(seeds)]
    sweeps: dict[str, dict[float, tuple[Trajectory, int, int]]] = {name: {} for name in COMPARED}
    for rate in rates:
        for name in COMPARED:
            sweeps[name][rate] = train(plans[0], name, num_blocks, rate, seed)
            print(f"{name}, rate {rate:g}: {sweeps[name][rate][0].held_out_loss:.4f}", flush=True)
    best = {name: min(found, key=lambda rate: found[rate][0].held_out_loss) for name, found in sweeps.items()}
    repeated: dict[str, list[Trajectory]] = {name: [sweeps[name][best[name]][0]] for name in COMPARED}
    for number in range(1, seeds):
        for name in COMPARED:
            repeated[name].append(train(plans[number], name, num_blocks, best[name], seed + number)[0])
    patterns = []
    for name, runs in repeated.items():
        _, parameters, kept = sweeps[name][best[name]]
        losses = [each.held_out_loss for each in runs]
        patterns.append(
            {
                "pattern": name,
                "parameters": parameters,
                "rate": best[name],
                "sweep": {f"{rate:g}": found[0].held_out_loss for rate, found in sweeps[name].items()},
                "held_out_losses": losses,
                "mean": statistics.fmean(losses),
                "deviation": statistics.stdev(losses) if seeds > 1 else 0.0,
                "seconds": statistics.median(each.seconds for each in runs),
                "kept_bytes": kept,
                "curve": runs[0].losses,
            }
        )
    return {"patterns": patterns}


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Loss with its deviation, time and memory of each pattern."""
    panels = figure.subplots(1, 3, sharey=True)
    patterns = results["patterns"][::-1]
    names = [found["pattern"] for found in patterns]
    panels[0].errorbar(
        [found["mean"] for found in patterns],
        names,
        xerr=[found["deviation"] for found in patterns],
        fmt="o",
        capsize=3,
    )
    panels[0].set(xlabel="held-out loss per token (nats)")
    panels[1].barh(names, [found["seconds"] for found in patterns])
    panels[1].set(xlabel="training (s)")
    panels[2].barh(names, [found["kept_bytes"] / 1e6 for found in patterns])
    panels[2].set(xlabel="kept for the backward (MB)")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for found in results["patterns"]:
        yield (
            f"{found['pattern']:16} {found['parameters']:,} parameters, rate {found['rate']:g}: loss "
            f"{found['mean']:.4f} ± {found['deviation']:.4f}, {found['seconds']:.0f} s, "
            f"{found['kept_bytes'] / 1e6:.0f} MB"
        )


EXPERIMENT = Experiment("sparsity-patterns", QUESTION, run, report, draw)

if __name__ == "__main__":
    EXPERIMENT.main()
