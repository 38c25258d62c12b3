"""What does a whole training step cost with each method?

    python -m benchmarks.step --model builtin:smollm2-135m --dtype bf16
    python -m benchmarks.step --model random-0.5b --dtype bf16

A step is the forward, the backward through every layer, and the optimizer's step. With every method, the output of the
embeddings requires a gradient. So the backward goes through all layers also in the frozen model, which has no trained
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import DTYPES, Device, Dtype, paired_ratio, print_table, time_interleaved
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE, build
from diablo.models.loading import count_parameters, load_model, resolve_model
from diablo.records.results import write_record
from diablo.tuner import DiabloLayer
from diablo.tuner.targets import PAPER_TARGETS

QUESTION = "a training step of a language model, as a ratio to the frozen model's"
RANDOM = "random-0.5b"
SWEEPS = "the four sweeps"
METHODS = f"{FROZEN},{IN_PLACE},{BESIDE},LoRA,DoRA,MiSS,SHiRA,C3A,OFT"


def language_model(name: str, dtype: torch.dtype) -> Any:
    """The model of that name; for ``random-0.5b`` a Llama with half a billion random weights."""
    if name != RANDOM:
        return load_model(resolve_model(name), dtype)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


def sweeps_of(model: nn.Module) -> Callable[[], None]:
    """What a step in place does besides its products: it writes the blocks and restores the base values, twice."""
    layers = [layer for layer in model.modules() if isinstance(layer, DiabloLayer)]
    sweep = layers[0].passes.plan(layers).sweep

    def run() -> None:
        for _ in range(2):
            sweep.write()
            sweep.restore()

    return run


def main(
    model: Annotated[str, typer.Option(help=f"A folder, a hub id, builtin:NAME or {RANDOM}.")] = "builtin:smollm2-135m",
    dtype: Dtype = "bf16",
    device: Device = "cpu",
    rows: int = 4,
    length: int = 256,
    num_blocks: int = 64,
    rounds: int = 7,
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = METHODS,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Under torch.compile.")] = False,
    out: Path | None = None,
) -> None:
    """Time a training step with every method."""
    where = torch.device(device)
    base = language_model(model, DTYPES[dtype]).to(where)
    ids = torch.randint(base.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(where)
    targets = list(PAPER_TARGETS)

    def stepper(name: str) -> tuple[Any, nn.Module]:
        adapted = build(name, copy.deepcopy(base), targets, num_blocks)
        embeddings: Any = adapted.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, y: y.requires_grad_())
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None
        run = torch.compile(adapted) if compiled else adapted

        def step() -> None:
            run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return step, adapted

    steppers = {name: stepper(name) for name in methods.split(",")}
    timed = {name: step for name, (step, _) in steppers.items()}
    if IN_PLACE in steppers:
        timed[SWEEPS] = sweeps_of(steppers[IN_PLACE][1])
    times = time_interleaved(timed, rounds, where)
    sweeps = times.pop(SWEEPS, None)
    results = [
        {
            "method": name,
            "parameters": count_parameters(steppers[name][1])[0],
            "median_seconds": timing.median,
            "ratio_to_frozen": paired_ratio(timing, times[FROZEN]),
            "tokens_per_second": rows * length / timing.median,
            "seconds": timing.seconds,
        }
        for name, timing in times.items()
    ]
    print(f"\n{model}, {rows} x {length} tokens, {dtype} on {device}{', compiled' if compiled else ''}")
    print_table(
        ["method", "parameters", "seconds", "ratio to frozen", "tokens/s"],
        [
            [
                row["method"],
                f"{row['parameters']:,}",
                row["median_seconds"],
                row["ratio_to_frozen"],
                round(row["tokens_per_second"]),
            ]
            for row in results
        ],
    )
    if sweeps is not None:
        share = paired_ratio(sweeps, times[IN_PLACE])
        results.append({"method": SWEEPS, "median_seconds": sweeps.median, "ratio_to_in_place": share})
        print(f"\n{SWEEPS}: {sweeps.median * 1e3:.1f} ms, {share:.2%} of the step in place")
    settings = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "rows": rows,
        "length": length,
        "num_blocks": num_blocks,
        "rounds": rounds,
        "targets": targets,
        "compiled": compiled,
    }
    label = model.rpartition(":")[2].rpartition("/")[2] + ("-compiled" if compiled else "")
    write_record(out or Path(f"docs/results/step-{label}-{device}-{dtype}.json"), QUESTION, settings, results)


if __name__ == "__main__":
    typer.run(main)
