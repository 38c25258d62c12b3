"""What does an adapter add to the forward and backward of one linear layer?

python -m benchmarks.layer --dtype bf16
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.harness import DTYPES, Device, Dtype, paired_ratio, print_table, time_interleaved
from benchmarks.methods import FROZEN, METHODS, build
from diablo.models.loading import count_parameters
from diablo.records.results import write_record

QUESTION = "forward and backward of one adapted linear layer, as a ratio to the frozen one"


class OneLayer(nn.Module):
    """A model of one layer: PEFT adapts the layers of a model, not a layer by itself."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, in_features)`` to ``(tokens, out_features)``."""
        return self.layer(x)


def measure(
    sizes: tuple[int, int],
    tokens: int,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    methods: tuple[str, ...] = METHODS,
) -> list[dict[str, Any]]:
    """Time every method on one layer.

    Args:
        sizes: inputs and outputs of the layer.
        tokens: rows of the input.
        num_blocks: DiaBlo's N.
        dtype: dtype of the layer.
        device: where it runs.
        rounds: number of measured rounds.
        methods: names of the methods.

    Returns:
        One row for each method: the seconds, the ratio to the frozen layer, and the overhead as a share of LoRA's.
    """
    torch.manual_seed(0)
    base = OneLayer(*sizes).to(device, dtype)
    x = torch.randn(tokens, sizes[0], device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, sizes[1], device=device, dtype=dtype)
    models = {name: build(name, copy.deepcopy(base), ["layer"], num_blocks) for name in methods}

    def runner(model: nn.Module) -> Any:
        def run() -> None:
            x.grad = None
            for parameter in model.parameters():
                parameter.grad = None
            model(x).backward(grad)

        return run

    times = time_interleaved({name: runner(model) for name, model in models.items()}, rounds, device)
    ratios = {name: paired_ratio(timing, times[FROZEN]) for name, timing in times.items()}
    return [
        {
            "in_features": sizes[0],
            "out_features": sizes[1],
            "tokens": tokens,
            "num_blocks": num_blocks,
            "method": name,
            "parameters": count_parameters(models[name])[0],
            "median_seconds": timing.median,
            "ratio_to_frozen": ratios[name],
            "overhead_over_loras": (ratios[name] - 1) / (ratios["LoRA"] - 1),
            "seconds": timing.seconds,
        }
        for name, timing in times.items()
    ]


def main(
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    tokens: int = 1024,
    num_blocks: int = 64,
    rounds: int = 9,
    sizes: Annotated[str, typer.Option(help="Layers as INxOUT, separated by commas.")] = (
        "2048x2048,4096x4096,4096x11008"
    ),
    out: Path | None = None,
) -> None:
    """Time one layer with every method."""
    results: list[dict[str, Any]] = []
    for size in sizes.split(","):
        in_features, out_features = map(int, size.split("x"))
        results += measure((in_features, out_features), tokens, num_blocks, DTYPES[dtype], torch.device(device), rounds)
        rows = [
            [
                row["method"],
                f"{row['parameters']:,}",
                row["median_seconds"] * 1e3,
                row["ratio_to_frozen"],
                row["overhead_over_loras"],
            ]
            for row in results
            if (row["in_features"], row["out_features"]) == (in_features, out_features)
        ]
        print(f"\n{size}, {tokens} tokens, {dtype} on {device}")
        print_table(["method", "parameters", "ms", "ratio to frozen", "overhead / LoRA's"], rows)
    settings = {"dtype": dtype, "device": device, "tokens": tokens, "num_blocks": num_blocks, "rounds": rounds}
    write_record(out or Path(f"docs/results/layer-{device}-{dtype}.json"), QUESTION, settings, results)


if __name__ == "__main__":
    typer.run(main)
