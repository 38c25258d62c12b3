"""How much is sent to an engine that generates, in each step: the whole model, the adapted weights, or the diagonals?

    python -m benchmarks.handover

It counts, from configs alone: nothing is trained or sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from transformers import AutoConfig, LlamaConfig

from benchmarks.harness import print_table
from diablo.models.loading import resolve_model
from diablo.planning.making import adapt_on_meta
from diablo.recipes.methods import DiabloMethod
from diablo.records.results import write_record

QUESTION = "bytes an engine is sent in a step of GRPO, in bf16: the whole model, the adapted weights, their diagonals"
BYTES = 2


def main(num_blocks: int = 16, out: Path = Path("docs/results/handover.json")) -> None:
    """Count, and write the record."""
    configs = {
        "SmolLM2-135M": AutoConfig.from_pretrained(resolve_model("builtin:smollm2-135m")),
        "Llama 3 8B": LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            architectures=["LlamaForCausalLM"],
        ),
    }
    results: list[dict[str, Any]] = []
    for name, config in configs.items():
        targets, (trained, total) = adapt_on_meta(DiabloMethod(name="diablo", num_blocks=num_blocks), config)
        adapted = sum(kind.count * kind.shape[0] * kind.shape[1] for kind in targets if kind.shape is not None)
        # What is adapted is no part of the model that an engine has.
        counts = {"whole model": total - trained, "adapted weights": adapted, "diagonals": trained}
        results.append({"model": name, "bytes": {what: BYTES * count for what, count in counts.items()}})
    write_record(out, QUESTION, {"num_blocks": num_blocks, "dtype": "bfloat16"}, results)
    rows = [[each["model"], *(f"{count / 1e6:,.1f} MB" for count in each["bytes"].values())] for each in results]
    print_table(["model", *results[0]["bytes"]], rows)


if __name__ == "__main__":
    typer.run(main)
