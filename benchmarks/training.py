"""How many tokens per second do ``diablo train`` and TRL's trainer with its defaults train on, end to end?

    python -m benchmarks.training

Each run goes from rows of text to an adapter: tokenization, batches, padding, loss, optimizer. The training itself is
timed, from the first batch to the last step. The tokens of the rows are counted, without padding.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from rich.progress import track
from trl import SFTConfig, SFTTrainer

from benchmarks.harness import DTYPES, Device, Dtype, print_table
from benchmarks.methods import equal_size
from diablo import DiabloConfig
from diablo.models.loading import load_model, load_tokenizer, resolve_model
from diablo.recipes.recipe import Recipe
from diablo.records.results import write_record
from diablo.tasks import get_task
from diablo.training import train
from diablo.tuner.targets import PAPER_TARGETS

QUESTION = "tokens a second of training on MAWPS, end to end"
TARGETS = list(PAPER_TARGETS)


def with_trl(
    model: str, rows: Sequence[dict[str, str]], config: PeftConfig, dtype: torch.dtype, settings: dict[str, Any]
) -> dict[str, float]:
    """Train with TRL's trainer and its defaults. Returns tokens per second and the share of padding."""
    tokens = padded = 0
    loaded = load_model(resolve_model(model), dtype, settings["attention"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            loaded,
            args=SFTConfig(
                output_dir=folder,
                max_steps=settings["steps"],
                per_device_train_batch_size=settings["batch_size"],
                learning_rate=1e-4,
                bf16=dtype == torch.bfloat16,
                use_cpu=settings["device"] == "cpu",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=load_tokenizer(resolve_model(model)),
            peft_config=config,
        )
        collate = trainer.data_collator

        def counted(features: Any) -> Any:
            nonlocal tokens, padded
            batch = collate(features)
            tokens += int(batch["attention_mask"].sum())
            padded += batch["attention_mask"].numel()
            return batch

        trainer.data_collator = counted
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return {"tokens_per_second": tokens / seconds, "padding_share": 1 - tokens / padded}  # pyrefly: ignore[division-by-zero]


def with_diablo(
    model: str, rows: Sequence[dict[str, str]], method: dict[str, Any], dtype: str, settings: dict[str, Any]
) -> dict[str, float]:
    """Train as ``diablo train`` does. Returns tokens per second and the share of padding."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        recipe = Recipe.model_validate(
            {
                "model": model,
                "data": {"train": data},
                "method": {"target_modules": TARGETS, **method},
                "training": {
                    "max_steps": settings["steps"],
                    "batch_size": settings["batch_size"],
                    "learning_rate": 1e-4,
                    "logging_steps": 10,
                },
                "precision": dtype,
                "attention": settings["attention"],
                "output": Path(folder) / "run",
            }
        )
        record = train(recipe).record
    return {
        "tokens_per_second": record["training"]["tokens_per_second"],
        "padding_share": record["data"]["padding_share"],
    }


def main(
    model: str = "builtin:smollm2-135m",
    dtype: Dtype = "bf16",
    device: Device = "cpu",
    attention: Annotated[str, typer.Option(help="eager or sdpa.")] = "eager",
    num_blocks: int = 64,
    batch_size: int = 16,
    steps: int = 8,
    rounds: int = 7,
    out: Path | None = None,
) -> None:
    """Time whole runs of DiaBlo and of LoRA with equally many parameters, with each of the two trainers."""
    settings = {
        "attention": attention,
        "device": device,
        "dtype": dtype,
        "num_blocks": num_blocks,
        "batch_size": batch_size,
        "steps": steps,
        "rounds": rounds,
        "targets": TARGETS,
    }
    rows = [
        {"prompt": problem.row.prompt, "completion": problem.row.completion or ""}
        for problem in get_task("mawps").problems("train")
    ]
    base = load_model(resolve_model(model), DTYPES[dtype])
    rank = equal_size(lambda r: LoraConfig(r=r), base, TARGETS, num_blocks)
    configs = {
        "DiaBlo": DiabloConfig(num_blocks=num_blocks, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "LoRA": LoraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM"),
    }
    methods = {"DiaBlo": {"name": "diablo", "num_blocks": num_blocks}, "LoRA": {"name": "lora", "r": rank}}
    runs: dict[tuple[str, str], Callable[[], dict[str, float]]] = {
        (trainer, name): (
            (lambda name=name: with_diablo(model, rows, methods[name], dtype, settings))
            if trainer == "diablo train"
            else (lambda name=name: with_trl(model, rows, configs[name], DTYPES[dtype], settings))
        )
        for trainer in ("diablo train", "TRL")
        for name in methods
    }
    measured: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in runs}
    for round_ in track(range(-1, rounds), description="rounds", transient=True):
        turn = round_ % len(runs)
        for key in [*runs][turn:] + [*runs][:turn]:
            figures = runs[key]()
            if round_ >= 0:
                measured[key].append(figures)
    reference = [figures["tokens_per_second"] for figures in measured["TRL", "LoRA"]]
    results: list[dict[str, Any]] = []
    for (trainer, name), figures in measured.items():
        speeds = [each["tokens_per_second"] for each in figures]
        results.append(
            {
                "trainer": trainer,
                "method": name,
                "tokens_per_second": statistics.median(speeds),
                "ratio_to_lora_in_trl": statistics.median(a / b for a, b in zip(speeds, reference, strict=True)),
                "padding_share": statistics.median(each["padding_share"] for each in figures),
                "all_tokens_per_second": speeds,
            }
        )
    print(f"\n{model}, {batch_size} rows a step, {dtype} on {device}")
    print_table(
        ["trainer", "method", "tokens/s", "ratio", "padding"],
        [
            [r["trainer"], r["method"], round(r["tokens_per_second"]), r["ratio_to_lora_in_trl"], r["padding_share"]]
            for r in results
        ],
    )
    write_record(
        out or Path(f"docs/results/training-{device}-{dtype}.json"),
        QUESTION,
        {"model": model, "lora_rank": rank, **settings},
        results,
    )


if __name__ == "__main__":
    typer.run(main)
