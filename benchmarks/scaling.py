"""How does the cost grow with the number of blocks, the tokens and the width?

python -m benchmarks.scaling
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.harness import DTYPES, Device, Dtype, print_table
from benchmarks.layer import measure
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE
from diablo.records.results import write_record

QUESTION = "forward and backward of one adapted linear layer over N, tokens and width, as a ratio to the frozen one"
WIDTH, TOKENS, NUM_BLOCKS = 2048, 512, 64


def main(
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Vary width, tokens or N, one at a time, around a layer of 2048 x 2048 with 512 tokens and 64 blocks."""
    points = [(WIDTH, TOKENS, num_blocks) for num_blocks in (8, 16, 32, 64, 128, 256)]
    points += [(WIDTH, tokens, NUM_BLOCKS) for tokens in (64, 256, 1024, 4096, 8192)]
    points += [(width, TOKENS, NUM_BLOCKS) for width in (512, 1024, 4096, 8192)]
    results: list[dict[str, Any]] = []
    rows = []
    for width, tokens, num_blocks in points:
        measured = measure(
            (width, width),
            tokens,
            num_blocks,
            DTYPES[dtype],
            torch.device(device),
            rounds,
            (FROZEN, IN_PLACE, BESIDE, "LoRA"),
        )
        results += measured
        ratios = {row["method"]: row["ratio_to_frozen"] for row in measured}
        rows.append([width, tokens, num_blocks, ratios[IN_PLACE], ratios[BESIDE], ratios["LoRA"]])
    print_table(["width", "tokens", "N", IN_PLACE, BESIDE, "LoRA"], rows)
    settings = {"dtype": dtype, "device": device, "rounds": rounds}
    write_record(out or Path(f"docs/results/scaling-{device}-{dtype}.json"), QUESTION, settings, results)


if __name__ == "__main__":
    typer.run(main)
