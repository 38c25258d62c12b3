"""How much time of the host does an adapter take for each layer?

    python -m benchmarks.host

The layers are so narrow that nearly all of the time goes into Python and dispatch around the products. A GPU has to
wait for these, and a CPU spends its time on them where inputs are short. A lower bound stands beside the methods: one
autograd function that does for the blocks only what must be done.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import nn

from benchmarks.harness import DTYPES, Device, Dtype, Timing, print_table, time_interleaved
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE, build
from diablo.models.loading import count_parameters
from diablo.records.results import write_record

QUESTION = "microseconds of the host for the forward and backward of one narrow adapted linear layer"
BARE = "bare autograd function"
METHODS = (FROZEN, BARE, IN_PLACE, BESIDE, "LoRA", "DoRA", "MiSS", "OFT", "loralib")


class _Bare(torch.autograd.Function):
    """A product with a weight in which the blocks stand, and the gradients of the input and of the blocks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.count = blocks.shape[0]
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        x, weight = ctx.saved_tensors
        tokens, count = x.shape[0], ctx.count
        inputs, outputs = x.view(tokens, count, -1), grad_y.view(tokens, count, -1)
        return grad_y @ weight, None, torch.bmm(inputs.permute(1, 2, 0), outputs.transpose(0, 1))


class BareLinear(nn.Module):
    """A linear layer whose forward is only that function: the least that training blocks in a weight can cost."""

    def __init__(self, weight: nn.Parameter, num_blocks: int) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.weight = weight
        self.blocks = nn.Parameter(weight.new_zeros(num_blocks, in_features // num_blocks, out_features // num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, in_features)`` to ``(tokens, out_features)``."""
        return _Bare.apply(x, self.weight, self.blocks)


def adapted(name: str, base: nn.Sequential, num_blocks: int) -> Any:
    """A copy of the layers with a method, or with the lower bound."""
    model: Any = copy.deepcopy(base).requires_grad_(False)
    if name == BARE:
        return nn.Sequential(*(BareLinear(layer.weight, num_blocks) for layer in model))
    return build(name, model, [layer for layer, _ in model.named_children()], num_blocks)


def measure(
    width: int,
    layers: int,
    rows: int,
    num_blocks: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    at_least: float = 0.05,
) -> list[dict[str, Any]]:
    """Time every method on a stack of layers, one after the other.

    Args:
        width: inputs and outputs of each layer.
        layers: number of layers.
        rows: rows of the input.
        num_blocks: DiaBlo's N.
        dtype: dtype of the layers.
        device: where they run.
        rounds: number of measured rounds.
        at_least: the least number of seconds that one measurement takes.

    Returns:
        One row for each method. It has the microseconds for each layer of a forward with its backward, and of a forward
        without gradients; the microseconds that the method adds to the frozen layer; and these as a share of what LoRA
        adds. A method that was left out has the reason instead.
    """
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(device, dtype)
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, width, device=device, dtype=dtype)
    notes = {} if find_spec("loralib") else {"loralib": "not installed"}
    models = {name: adapted(name, base, num_blocks) for name in METHODS if name not in notes}

    def both(model: nn.Module) -> Callable[[], None]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def run() -> None:
            x.grad = None
            for parameter in trained:
                parameter.grad = None
            model(x).backward(grad)

        return run

    def forward(model: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model(x)

        return run

    times = time_interleaved({name: both(model) for name, model in models.items()}, rounds, device, 2, at_least)
    forwards = time_interleaved({name: forward(model) for name, model in models.items()}, rounds, device, 2, at_least)

    def added(name: str) -> float:
        return statistics.median(_differences(times[name], times[FROZEN])) / layers * 1e6

    return [
        {
            "method": name,
            "parameters": count_parameters(models[name])[0],
            "microseconds": times[name].median / layers * 1e6,
            "added_microseconds": added(name),
            "added_over_loras": added(name) / added("LoRA"),
            "forward_microseconds": forwards[name].median / layers * 1e6,
            "seconds": times[name].seconds,
            "forward_seconds": forwards[name].seconds,
        }
        for name in models
    ] + [{"method": name, "note": note} for name, note in notes.items()]


def _differences(timing: Timing, reference: Timing) -> Iterator[float]:
    """How many seconds longer a method took than the reference, in each round."""
    return (a - b for a, b in zip(timing.seconds, reference.seconds, strict=True))


def print_rows(results: list[dict[str, Any]]) -> None:
    """Print the record's rows as a table."""
    print_table(
        ["method", "us a layer", "us added", "added / LoRA's", "us, forward alone"],
        [
            [
                row["method"],
                *(f"{row[key]:.1f}" for key in ("microseconds", "added_microseconds")),
                f"{row['added_over_loras']:.2f}",
                f"{row['forward_microseconds']:.1f}",
            ]
            if "note" not in row
            else [row["method"], row["note"], "", "", ""]
            for row in results
        ],
    )


def main(
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    width: int = 64,
    layers: int = 24,
    rows: int = 2,
    num_blocks: int = 8,
    rounds: int = 21,
    out: Path | None = None,
) -> None:
    """Time a stack of narrow layers with every method, in one thread."""
    torch.set_num_threads(1)
    results = measure(width, layers, rows, num_blocks, DTYPES[dtype], torch.device(device), rounds)
    print(f"\n{layers} layers of {width} x {width}, {rows} rows, N = {num_blocks}, {dtype} on {device}\n")
    print_rows(results)
    settings = {
        "dtype": dtype,
        "device": device,
        "width": width,
        "layers": layers,
        "rows": rows,
        "num_blocks": num_blocks,
        "rounds": rounds,
    }
    write_record(out or Path(f"docs/results/host-{device}-{dtype}.json"), QUESTION, settings, results)


if __name__ == "__main__":
    typer.run(main)
