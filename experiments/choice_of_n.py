"""How many blocks, and in which modules?

    python -m experiments.choice_of_n

A smaller N trains more parameters. Each N is trained on word problems at several learning rates; at its best rate its
accuracy is measured too. A second table holds the number of trained parameters nearly the same and moves them between
modules: attention, the MLP, all of them, and the paper's choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diablo import DiabloConfig
from diablo.models.loading import count_parameters, meta_model
from diablo.planning.plan import Plan
from diablo.recipes.applying import apply_method, nearest_size, shapes_of, target_kinds
from diablo.recipes.methods import DiabloMethod
from diablo.scoring.generation import evaluate_task
from diablo.tasks import get_task
from experiments.finetuning import finetune, load_adapted, plan_data
from experiments.harness import Experiment, Model, Seed

QUESTION = "loss, accuracy, parameters and time over the number of blocks and the modules that have them"

NUM_BLOCKS = (4, 8, 16, 32, 64, 128, 192)
"""192 is as many as the narrowest layer of the model takes."""
RATES = (1e-3, 3e-3, 1e-2)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
MODULES: dict[str, list[str]] = {
    "q k v up down (the paper's)": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "all linear layers": ATTENTION + MLP,
    "attention": ATTENTION,
    "MLP": MLP,
    "q v": ["q_proj", "v_proj"],
    "up down": ["up_proj", "down_proj"],
}


def measure(plan: Plan, method: DiabloMethod, rates: Sequence[float], problems: int) -> dict[str, Any]:
    """Train a method at each rate, and score the best."""
    found, best = {}, None
    for rate in rates:
        model = load_adapted(plan, method)
        trajectory = finetune(model, plan, rate)
        found[rate] = trajectory
        if best is None or trajectory.held_out_loss < found[best[0]].held_out_loss:
            best = (rate, model)
    assert best is not None
    rate, model = best
    score = evaluate_task(model, plan.encoder, get_task("mawps"), limit=problems)
    trained, total = count_parameters(model)
    return {
        "parameters": trained,
        "share": trained / total,
        "rate": rate,
        "sweep": {f"{each:g}": found[each].held_out_loss for each in rates},
        "held_out_loss": found[rate].held_out_loss,
        "accuracy": next(iter(score.metrics.values())),
        "seconds": found[rate].seconds,
    }


def nearest_num_blocks(plan: Plan, targets: list[str], wanted: int) -> int:
    """The N at which blocks on some modules come closest to a number of parameters."""

    whole = DiabloMethod(num_blocks=1, target_modules=targets)
    shapes = shapes_of(target_kinds(apply_method(meta_model(plan.config), whole)))
    return nearest_size(lambda size: DiabloConfig(num_blocks=size), shapes, wanted)


def run(
    model: Model = "builtin:smollm2-135m",
    rows: int = 256,
    held_out: int = 128,
    problems: int = 128,
    num_blocks: Sequence[int] = NUM_BLOCKS,
    rates: Sequence[float] = RATES,
    modules: Mapping[str, list[str]] = MODULES,
    reference: int = 32,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Measure every N and every choice of modules.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        rows: training rows, in batches of 8.
        held_out: test rows for the loss.
        problems: test problems for the accuracy.
        num_blocks: the N to try, on the paper's modules.
        rates: learning rates.
        modules: the modules to try, each at the N whose parameters come closest to those of ``reference``.
        reference: an N on the paper's modules.
        seed: seed.
    """
    plan = plan_data(model, rows, held_out, 8, num_blocks[0], seed)
    by_number, by_modules = [], []
    for number in num_blocks:
        by_number.append({"num_blocks": number, **measure(plan, DiabloMethod(num_blocks=number), rates, problems)})
        print(f"N = {number}: {by_number[-1]['sweep']}", flush=True)
    wanted = count_parameters(apply_method(meta_model(plan.config), DiabloMethod(num_blocks=reference)))[0]
    for name, targets in modules.items():
        number = nearest_num_blocks(plan, targets, wanted)
        method = DiabloMethod(num_blocks=number, target_modules=targets)
        by_modules.append({"modules": name, "num_blocks": number, **measure(plan, method, rates, problems)})
        print(f"{name}: {by_modules[-1]['sweep']}", flush=True)
    return {"by_num_blocks": by_number, "by_modules": by_modules}


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Loss over the trained share, a line a rate, and loss by modules."""
    left, right = figure.subplots(1, 2)
    points = results["by_num_blocks"]
    numbers = [point["num_blocks"] for point in points]
    for rate in points[0]["sweep"]:
        left.plot(numbers, [point["sweep"][rate] for point in points], "o-", label=f"rate {rate}")
    left.set(xscale="log", xlabel="N", ylabel="held-out loss per token (nats)", xticks=numbers, xticklabels=numbers)
    left.minorticks_off()
    left.legend()
    found = results["by_modules"][::-1]
    right.barh(
        [f"{each['modules']}, N = {each['num_blocks']}" for each in found], [each["held_out_loss"] for each in found]
    )
    lowest = min(each["held_out_loss"] for each in found)
    right.set(xlabel="held-out loss per token (nats), equal parameters", xlim=(0.8 * lowest, None))


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for found in results["by_num_blocks"] + results["by_modules"]:
        what = found.get("modules", "q k v up down")
        yield (
            f"{what}, N = {found['num_blocks']}: {found['parameters']:,} ({found['share']:.2%}), rate "
            f"{found['rate']:g}, loss {found['held_out_loss']:.4f}, accuracy {found['accuracy']:.1%}, "
            f"{found['seconds']:.0f} s"
        )


EXPERIMENT = Experiment("choice-of-n", QUESTION, run, report, draw, size=(12, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
