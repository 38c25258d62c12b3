"""What does packing gain in training, on rows of a real task?

    python -m benchmarks.packing --task gsm8k --folder DATA

Every variant trains on the same rows, in steps of forward, backward and optimizer: padded in batches of rows that come
as they come, in batches of similar length (diablo's default), and packed. Tokens are counted without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.harness import DTYPES, Device, Dtype, paired_ratio, print_table, time_interleaved
from benchmarks.methods import IN_PLACE, build
from diablo.data.batching import LengthGroupedSampler, collate
from diablo.data.encoding import EncodedRow, RowEncoder
from diablo.data.packing import flatten, join, pack
from diablo.models.loading import load_model, load_tokenizer, resolve_model
from diablo.records.results import write_record
from diablo.scoring.losses import summed_completion_loss
from diablo.tasks import get_task
from diablo.tuner.targets import PAPER_TARGETS

QUESTION = "tokens a second of training on padded and on packed rows"
Features = list[dict[str, list[int]]]


def padded(rows: list[EncodedRow], batch_size: int) -> list[Features]:
    """Batches of rows as they come."""
    return [[row.features for row in rows[start : start + batch_size]] for start in range(0, len(rows), batch_size)]


def grouped(rows: list[EncodedRow], batch_size: int) -> list[Features]:
    """Batches of rows of similar length."""
    sampler = LengthGroupedSampler([len(row.input_ids) for row in rows], batch_size, seed=0)
    return [[rows[index].features for index in batch] for batch in sampler.batches()]


def packed(rows: list[EncodedRow], capacity: int, batch_size: int, *, flat: bool) -> list[Features]:
    """Batches of sequences of packed rows."""
    sequences = [join([rows[index] for index in each]) for each in pack([len(r.input_ids) for r in rows], capacity, 0)]
    batches = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    return [[flatten(batch)] for batch in batches] if flat else batches


def main(
    model: Annotated[str, typer.Option(help="A folder, a hub id or builtin:NAME.")] = "builtin:smollm2-135m",
    task: str = "gsm8k",
    folder: Annotated[Path | None, typer.Option(help="A folder with the task's data.")] = None,
    count: Annotated[int, typer.Option(help="Rows, the first of the task's.")] = 64,
    batch_sizes: Annotated[str, typer.Option(help="Rows of a padded batch, separated by commas.")] = "1,8",
    capacities: Annotated[str, typer.Option(help="Tokens of a packed sequence, separated by commas.")] = "512,1024",
    sequences: Annotated[int, typer.Option(help="Packed sequences of a batch.")] = 1,
    attention: str = "eager",
    dtype: Dtype = "bf16",
    device: Device = "cpu",
    num_blocks: int = 64,
    rounds: int = 5,
    out: Path | None = None,
) -> None:
    """Time a pass over the rows in each way."""
    where, name = torch.device(device), resolve_model(model)
    encoder = RowEncoder(load_tokenizer(name))
    rows = [encoder.encode(problem.row) for problem in get_task(task, folder=folder).problems("train")[:count]]
    tokens = sum(len(row.input_ids) for row in rows)
    adapted = build(IN_PLACE, load_model(name, DTYPES[dtype], attention), list(PAPER_TARGETS), num_blocks).to(where)
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-4, fused=True)

    variants = {f"as they come, {size} a batch": padded(rows, int(size)) for size in batch_sizes.split(",")}
    variants |= {f"of similar length, {size} a batch": grouped(rows, int(size)) for size in batch_sizes.split(",")}
    flat = "flash" in attention
    variants |= {
        f"packed to {capacity}, {sequences} a batch": packed(rows, int(capacity), sequences, flat=flat)
        for capacity in capacities.split(",")
    }

    def over(batches: list[Features]) -> Callable[[], None]:
        made = [{n: v.to(where) for n, v in collate(batch, 0).items()} for batch in batches]

        def run() -> None:
            for batch in made:
                (summed_completion_loss(adapted, batch) / len(batch["predicting"])).backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    times = time_interleaved({label: over(batches) for label, batches in variants.items()}, rounds, where, warmup=1)
    reference = times[f"of similar length, {batch_sizes.rpartition(',')[2]} a batch"]
    results = [
        {
            "rows": label,
            "batches": len(variants[label]),
            "padding": 1 - tokens / sum(collate(batch, 0)["input_ids"].numel() for batch in variants[label]),
            "tokens_per_second": tokens / timing.median,
            "ratio": 1 / paired_ratio(timing, reference),
            "seconds": timing.seconds,
        }
        for label, timing in times.items()
    ]
    print(f"\n{model}, {len(rows)} rows of {task}, {tokens} tokens, {attention}, {dtype} on {device}")
    print_table(
        ["rows", "batches", "padding", "tokens/s", "ratio"],
        [
            [r["rows"], r["batches"], f"{r['padding']:.1%}", round(r["tokens_per_second"]), f"{r['ratio']:.2f}"]
            for r in results
        ],
    )
    settings = {
        "model": model,
        "task": task,
        "count": len(rows),
        "tokens": tokens,
        "attention": attention,
        "dtype": dtype,
        "device": device,
        "num_blocks": num_blocks,
        "rounds": rounds,
    }
    write_record(
        out or Path(f"docs/results/packing-{task}-{attention}-{device}-{dtype}.json"), QUESTION, settings, results
    )


if __name__ == "__main__":
    typer.run(main)
