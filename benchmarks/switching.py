"""How long does it take to switch between two adapters of a model that serves with the adapter in its weights?

python -m benchmarks.switching
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from peft import LoraConfig, get_peft_model

from benchmarks.harness import DTYPES, Device, Dtype, paired_ratio, print_table, time_interleaved
from benchmarks.layer import OneLayer
from benchmarks.methods import equal_size
from diablo import DiabloConfig
from diablo.records.results import write_record

QUESTION = "switching the adapter that stands in the weight of one layer"


def main(
    dtype: Dtype = "bf16",
    device: Device = "cpu",
    in_features: int = 4096,
    out_features: int = 11008,
    num_blocks: int = 64,
    rounds: int = 15,
    out: Path | None = None,
) -> None:
    """Time switching: DiaBlo's set_adapter on a merged model, and PEFT LoRA's unmerge, set_adapter and merge."""
    where = torch.device(device)

    def model(config: Any) -> Any:
        adapted = get_peft_model(OneLayer(in_features, out_features).to(where, DTYPES[dtype]), config, "a")
        adapted.add_adapter("b", config)
        for parameter in adapted.parameters():
            if parameter.shape != (out_features, in_features):
                parameter.data.normal_(std=0.01)
        adapted.eval().merge_adapter(["a"])
        return adapted

    plain = OneLayer(in_features, out_features)
    rank = equal_size(lambda r: LoraConfig(r=r), plain, ["layer"], num_blocks)
    diablo = model(DiabloConfig(num_blocks=num_blocks, target_modules=["layer"]))
    lora = model(LoraConfig(r=rank, target_modules=["layer"]))

    def switch_diablo() -> None:
        for name in ("b", "a"):
            diablo.set_adapter(name)

    def switch_lora() -> None:
        for name in ("b", "a"):
            lora.unmerge_adapter()
            lora.set_adapter(name)
            lora.merge_adapter([name])

    times = time_interleaved({"DiaBlo": switch_diablo, "LoRA": switch_lora}, rounds, where)
    results = [
        {
            "method": name,
            "median_seconds": timing.median / 2,
            "ratio_to_diablo": paired_ratio(timing, times["DiaBlo"]),
            "seconds_of_two_switches": timing.seconds,
        }
        for name, timing in times.items()
    ]
    print_table(
        ["method", "ms a switch", "ratio"],
        [[row["method"], row["median_seconds"] * 1e3, row["ratio_to_diablo"]] for row in results],
    )
    settings = {
        "dtype": dtype,
        "device": device,
        "in_features": in_features,
        "out_features": out_features,
        "num_blocks": num_blocks,
        "lora_rank": rank,
        "rounds": rounds,
    }
    write_record(out or Path(f"docs/results/switching-{device}-{dtype}.json"), QUESTION, settings, results)


if __name__ == "__main__":
    typer.run(main)
