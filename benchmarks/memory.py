"""How much memory does a training step take with each method?

    python -m benchmarks.memory
    python -m benchmarks.memory times

The first command measures two things. The bytes that a forward keeps for its backward are counted tensor by tensor. The
peak of a step is measured in a process of its own for each method. A way of gradient checkpointing can follow the name
of a method, as in ``DiaBlo in place, selective``. The second command measures how much time checkpointing costs.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import (
    DTYPES,
    Device,
    Dtype,
    paired_ratio,
    peak_of,
    print_table,
    start_peak,
    time_interleaved,
)
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE, build
from benchmarks.step import language_model
from diablo.models.checkpointing import checkpointing_options
from diablo.models.loading import count_parameters
from diablo.planning.kept import kept_for_backward
from diablo.records.results import write_record
from diablo.tuner.targets import PAPER_TARGETS

QUESTION = "memory of a training step: bytes that a forward leaves to its backward, and the peak over the loaded model"
CHECKPOINTING = "forward and backward of a language model under gradient checkpointing, as a ratio to the same without"
CHECKPOINTED = [f"{name}, {choice}" for name in (IN_PLACE, BESIDE, "LoRA") for choice in ("selective", "full")]
METHODS = ";".join([FROZEN, IN_PLACE, BESIDE, "LoRA", *CHECKPOINTED, "DoRA", "MiSS", "SHiRA", "C3A", "OFT"])
TIMED = ";".join([FROZEN, IN_PLACE, "LoRA", *CHECKPOINTED])
LENGTHS = (64, 256, 1024)

app = typer.Typer()


@app.command()
def one(method: str, model: str, dtype: str, device: str, length: int, num_blocks: int) -> None:
    """Measure one method in this process, and print the figures as JSON."""
    where = torch.device(device)
    adapted = _build(method, language_model(model, DTYPES[dtype]).to(where), num_blocks)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    ids = torch.randint(adapted.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(where)
    short = ids[:, :8]
    before = start_peak(where)
    for batch in (short, ids, ids):
        adapted(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    peak = peak_of(where) - before
    saved = kept_for_backward(lambda: adapted(input_ids=ids, labels=ids, use_cache=False).loss)
    print(json.dumps({"saved": saved, "peak": peak, "parameters": count_parameters(adapted)[0]}))


@app.command()
def times(
    model: str = "builtin:smollm2-135m",
    dtype: Dtype = "bf16",
    device: Device = "cpu",
    rows: int = 4,
    length: int = 256,
    num_blocks: int = 64,
    rounds: int = 7,
    methods: Annotated[str, typer.Option(help="Separated by semicolons.")] = TIMED,
    out: Path | None = None,
) -> None:
    """Time the forward and the backward of a step, with and without gradient checkpointing."""
    where = torch.device(device)
    base = language_model(model, DTYPES[dtype]).to(where)
    ids = torch.randint(base.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(where)

    def stepper(name: str) -> Callable[[], None]:
        adapted = _build(name, copy.deepcopy(base), num_blocks)

        def step() -> None:
            adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            adapted.zero_grad()

        return step

    names = methods.split(";")
    timings = time_interleaved({name: stepper(name) for name in names}, rounds, where)
    results = [
        {
            "method": name,
            "median_seconds": timings[name].median,
            "ratio_to_frozen": paired_ratio(timings[name], timings[FROZEN]),
            "ratio_to_none": paired_ratio(timings[name], timings.get(name.partition(", ")[0], timings[FROZEN])),
            "seconds": timings[name].seconds,
        }
        for name in names
    ]
    print_table(
        ["method", "seconds", "ratio to frozen", "ratio to none"],
        [[r["method"], r["median_seconds"], r["ratio_to_frozen"], r["ratio_to_none"]] for r in results],
    )
    settings = {"model": model, "dtype": dtype, "device": device, "rows": rows, "length": length, "rounds": rounds}
    path = out or Path(f"docs/results/checkpointing-{device}-{dtype}.json")
    write_record(path, CHECKPOINTING, settings | {"num_blocks": num_blocks}, results)


@app.callback(invoke_without_command=True)
def every(
    context: typer.Context,
    model: str = "builtin:smollm2-135m",
    dtype: Dtype = "bf16",
    device: Device = "cpu",
    num_blocks: int = 64,
    methods: Annotated[str, typer.Option(help="Separated by semicolons.")] = METHODS,
    out: Path | None = None,
) -> None:
    """Measure the memory of every method, with one row of 64, 256 and 1024 tokens."""
    if context.invoked_subcommand is not None:
        return
    results: list[dict[str, Any]] = []
    for length in LENGTHS:
        for name in methods.split(";"):
            command = [sys.executable, "-m", "benchmarks.memory", "one", name, model, dtype, device]
            done = subprocess.run([*command, str(length), str(num_blocks)], capture_output=True, text=True, check=True)
            results.append({"method": name, "length": length, **json.loads(done.stdout.strip().splitlines()[-1])})
    print_table(
        ["tokens", "method", "parameters", "kept, MB", "peak, MB"],
        [[r["length"], r["method"], f"{r['parameters']:,}", r["saved"] / 1e6, r["peak"] / 1e6] for r in results],
    )
    settings = {"model": model, "dtype": dtype, "device": device, "num_blocks": num_blocks}
    write_record(out or Path(f"docs/results/memory-{device}-{dtype}.json"), QUESTION, settings, results)


def _build(method: str, model: Any, num_blocks: int) -> Any:
    """A model with a method, and with the gradient checkpointing that follows the method's name."""
    name, _, checkpointing = method.partition(", ")
    adapted = build(name, model, list(PAPER_TARGETS), num_blocks)
    adapted.get_input_embeddings().register_forward_hook(lambda module, args, y: y.requires_grad_())
    if checkpointing:
        options = checkpointing_options(checkpointing)  # pyrefly: ignore[bad-argument-type]
        adapted.gradient_checkpointing_enable(options)
    return adapted


if __name__ == "__main__":
    app()
