"""How do the gradients of DiaBlo and of LoRA behave in training, and how much does the learning rate matter?

    python -m experiments.stability

The paper's observation: DiaBlo's gradient norm varies less than LoRA's, and LoRA's A receives next to no gradient in
the beginning, since B starts at zero. Both are trained on word problems at equal parameters, at each of six learning
rates. At each step the norm of the gradient is recorded, for LoRA by factor too. It is compared by its coefficient of
variation, the deviation over the steps divided by the mean, since the two norms are of different sizes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig

from diablo.recipes.applying import nearest_size, shapes_of
from diablo.recipes.methods import AnyMethod, DiabloMethod, LoraMethod
from experiments.finetuning import Trajectory, finetune, load_adapted, plan_data
from experiments.harness import Experiment, Model, Seed

QUESTION = "gradient norms over the steps, and the held-out loss over learning rates, of DiaBlo and LoRA"

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def norms_by_kind(model: torch.nn.Module) -> dict[str, float]:
    """The norm of the gradient of the parameters of each kind: blocks, A, B."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = next((kind for part, kind in (("lora_A", "A"), ("lora_B", "B")) if part in name), "blocks")
            squares[kind] = squares.get(kind, 0.0) + parameter.grad.float().square().sum().item()
    return {kind: square**0.5 for kind, square in squares.items()}


def describe(found: Trajectory, rate: float, warmup: int) -> dict[str, Any]:
    """The figures of a run. Statistics leave out the steps of the warm-up."""
    norms = found.gradient_norms[warmup:]
    return {
        "rate": rate,
        "held_out_loss": found.held_out_loss,
        "mean_norm": statistics.fmean(norms),
        "variance_of_norm": statistics.variance(norms),
        "coefficient_of_variation": statistics.stdev(norms) / statistics.fmean(norms),
        "norms": found.gradient_norms,
        "norms_by_kind": found.watched,
        "losses": found.losses,
    }


def run(
    model: Model = "builtin:smollm2-135m",
    num_blocks: int = 16,
    rows: int = 256,
    held_out: int = 128,
    rates: Sequence[float] = RATES,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Train both methods at every rate.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        num_blocks: N; LoRA has the rank whose parameters come closest.
        rows: training rows, in batches of 8.
        held_out: test rows.
        rates: learning rates.
        seed: seed.
    """
    warmup = 4
    plan = plan_data(model, rows, held_out, 8, num_blocks, seed)
    rank = nearest_size(lambda size: LoraConfig(r=size), shapes_of(plan.targets), plan.parameters[0])
    methods: dict[str, AnyMethod] = {
        "diablo": DiabloMethod(num_blocks=num_blocks),
        "lora": LoraMethod(name="lora", r=rank),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for rate in rates:
        for name, method in methods.items():
            torch.manual_seed(seed)
            found = finetune(load_adapted(plan, method), plan, rate, warmup=warmup, watch=norms_by_kind)
            runs[name].append(describe(found, rate, warmup))
            print(f"{name}, rate {rate:g}: {found.held_out_loss:.4f}", flush=True)
    return {"rank": rank, "parameters": plan.parameters[0], "runs": runs}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the lowest held-out loss."""
    return min(runs, key=lambda found: found["held_out_loss"])


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Norms at the best rate, LoRA's by factor, and the loss over the rates."""
    norms, factors, losses = figure.subplots(1, 3)
    for method, runs in results["runs"].items():
        found = best(runs)
        mean = found["mean_norm"]
        norms.plot([norm / mean for norm in found["norms"]], label=f"{method}, rate {found['rate']:g}")
        losses.plot([each["rate"] for each in runs], [each["held_out_loss"] for each in runs], "o-", label=method)
    for kind in ("A", "B"):
        watched = best(results["runs"]["lora"])["norms_by_kind"]
        factors.plot([step[kind] for step in watched], label=f"LoRA's {kind}")
    norms.set(xlabel="step", ylabel="gradient norm / its mean")
    factors.set(xlabel="step", ylabel="gradient norm", yscale="log")
    losses.set(xlabel="learning rate", ylabel="held-out loss per token (nats)", xscale="log")
    for axes in (norms, factors, losses):
        axes.legend()


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for method, runs in results["runs"].items():
        found = best(runs)
        first = found["norms_by_kind"][0]
        yield (
            f"{method}: best rate {found['rate']:g}, loss {found['held_out_loss']:.4f}; gradient norm "
            f"{found['mean_norm']:.3g}, coefficient of variation {found['coefficient_of_variation']:.2f}; "
            "at the first step " + ", ".join(f"{kind} {norm:.3g}" for kind, norm in first.items())
        )


EXPERIMENT = Experiment("stability", QUESTION, run, report, draw, size=(14, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
