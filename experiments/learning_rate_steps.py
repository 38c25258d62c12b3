"""Does the best learning rate of blocks depend on the number of steps, and on how many of them warm up?

    python -m experiments.learning_rate_steps --kept runs.jsonl
    python -m experiments.learning_rate_steps --task gsm8k --folder DATA/gsm8k --kept runs.jsonl

A real model is trained on as many rows as the steps take, each row once, at one rate for all blocks. The rates are in
steps of two around that of experiments.learning_rate, until the best one is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from diablo.planning.plan import Plan
from diablo.recipes.methods import DiabloMethod
from diablo.scoring.generation import held_out_loss
from experiments import learning_rate
from experiments.finetuning import finetune, load_adapted, plan_data
from experiments.harness import Experiment, Model, Seed, keep_run, kept_runs
from experiments.learning_rate import KINDS, RULE, groups_of, median_gain, sweep

QUESTION = "the best learning rate over the number of steps and of those that warm up"

NUM_BLOCKS, BATCH_SIZE = 16, 8
LENGTHS = ((24, 4), (48, 4), (96, 8), (192, 16))
WARMUPS = ((24, 4), (24, 12), (192, 4), (192, 16))
RUN = ("task", "seed", "steps", "warmup", "rate")
"""What tells a run that is kept from the others."""


def run(
    model: Model = "builtin:smollm2-135m",
    task: Annotated[str, typer.Option(help="The task.")] = "mawps",
    folder: Annotated[str, typer.Option(help="The data of the task, where it is not in the package.")] = "",
    held_out: int = 128,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    warmups: Sequence[tuple[int, int]] = WARMUPS,
    seed: Seed = 0,
    kept: Annotated[str, typer.Option(help="A file for what is done, from which an interrupted one goes on.")] = "",
) -> dict[str, Any]:
    """Sweep every setting.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        task: what it is trained on.
        folder: where the data of the task is.
        held_out: test rows for the loss.
        lengths: the runs of several lengths: the steps of each, and how many of them warm up.
        warmups: the runs of one length that differ in that.
        seed: seed of the order of the rows.
        kept: a file of JSON lines, one for each run that is done.
    """
    done = {tuple(each[name] for name in RUN): each["loss"] for each in kept_runs(kept)}
    method = DiabloMethod(num_blocks=NUM_BLOCKS, target_modules=list(KINDS))
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for steps, warmup in dict.fromkeys([*lengths, *warmups]):
        plan = plan_data(model, steps * BATCH_SIZE, held_out, BATCH_SIZE, NUM_BLOCKS, seed, task, folder)
        plain = load_adapted(plan, method)
        before = held_out_loss(plain, plan.held_out, plan.encoder.tokenizer.pad_token_id)
        rate = groups_of(plain, RULE, "one")[0]["lr"]

        def loss_at(multiple: float, plan: Plan = plan, warmup: int = warmup, rate: float = rate) -> float:
            key = (task, seed, plan.steps, warmup, multiple * rate)
            if key not in done:
                done[key] = finetune(load_adapted(plan, method), plan, multiple * rate, warmup=warmup).held_out_loss
                keep_run(kept, {**dict(zip(RUN, key, strict=True)), "loss": done[key]})
            print(f"{plan.steps} steps, {warmup} of warm-up, at {multiple * rate:.2g}: {done[key]:.4f}", flush=True)
            return done[key]

        known = {"steps": steps, "warmup": warmup, "gain": median_gain(plain), "rate": rate}
        found[steps, warmup] = {**known, **sweep(loss_at, before)}
    return {"steps": [found[each] for each in lengths], "warmup": [found[each] for each in warmups]}


EXPERIMENT = Experiment("learning-rate-steps", QUESTION, run, learning_rate.report, learning_rate.draw, size=(9, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
