"""What does the reference of DPO cost: in memory, and in forwards of a step?

    python -m benchmarks.preferences

Each way trains on the same pairs for two epochs, in a process of its own: a right equation of MAWPS against another
problem's. The bytes of all parameters are counted in the midst of training, as are the forwards of a step. The peak is
that of the process over what it held before the model was loaded.
"""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks.harness import Dtype, peak_of, print_table, start_peak
from diablo import DiabloConfig
from diablo.devices import parse_dtype
from diablo.models.loading import load_model, load_tokenizer, resolve_model
from diablo.recipes.reading import check_settings
from diablo.records.results import write_record
from diablo.tasks import get_task
from diablo.training import train
from diablo.tuner.targets import PAPER_TARGETS

QUESTION = "memory and forwards of DPO by what holds the reference"
MODEL = "builtin:smollm2-135m"
STEPS = 4
WAYS = (
    "diablo train, DiaBlo",
    "diablo train, LoRA",
    "diablo train, full",
    "TRL, DiaBlo, adapter off",
    "TRL, LoRA, adapter off",
    "TRL, LoRA, copy of the adapter",
    "TRL, LoRA, two models",
    "TRL, full, two models",
)

app = typer.Typer()


def pairs(count: int) -> list[dict[str, str]]:
    """Equations of problems, each against that of another problem."""
    rows = [problem.row for problem in get_task("mawps").problems("train")]
    found = [
        {"prompt": row.prompt, "chosen": row.completion, "rejected": other.completion}
        for row, other in itertools.pairwise(rows)
        if row.completion != other.completion
    ]
    return found[:count]


class Counter:
    """Counts the forwards of whole models, and the bytes of all parameters, once training is going on."""

    def __init__(self) -> None:
        self.forwards = 0
        self.learning = 0
        self.held = 0
        # A module that torch does not own would be called once more by each of its parents.
        torch.nn.modules.module.register_module_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not (isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None):
            return
        self.forwards += 1
        if torch.is_grad_enabled() and module.training:
            self.learning += 1
            if self.learning == STEPS:
                # A plan's model on the meta device holds nothing.
                alive = {id(p): p for p in gc.get_objects() if isinstance(p, torch.nn.Parameter) and not p.is_meta}
                self.held = sum(parameter.nbytes for parameter in alive.values())


@app.command()
def one(way: str, dtype: str, batch_size: int) -> None:
    """Train in this process in one of the ways, and print the figures as JSON."""
    name, *rest = way.split(", ")
    # Two epochs.
    rows = pairs(STEPS * batch_size // 2)
    # What is imported late is held before.
    from trl import DPOConfig, DPOTrainer  # noqa: F401

    from diablo.training.trainers.making import make_trainer  # noqa: F401

    gc.collect()
    counter, before = Counter(), start_peak(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        by_name: dict[str, Callable[..., None]] = {"diablo train": _by_recipe, "TRL": _by_trl}
        by_name[name](Path(folder), rows, dtype, batch_size, *rest)
    peak = peak_of(torch.device("cpu")) - before
    # The preflight's forward is the first that learns, and the reference's forwards are those that do not.
    print(json.dumps({"held": counter.held, "peak": peak, "forwards": counter.forwards, "learning": counter.learning}))


def _by_recipe(folder: Path, rows: list[dict[str, str]], dtype: str, batch_size: int, method: str) -> None:
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    sections: dict[str, Any] = {"DiaBlo": {"name": "diablo", "num_blocks": 64}, "LoRA": {"name": "lora", "r": 8}}
    settings = {
        "model": MODEL,
        "objective": "dpo",
        "data": {"train": str(folder / "pairs.jsonl")},
        "method": sections.get(method, {"name": "full"}),
        "training": {"batch_size": batch_size, "learning_rate": 1e-4, "max_steps": STEPS},
        "evaluation": {"before": False, "after": False},
        "precision": dtype,
        "output": str(folder / "run"),
    }
    train(check_settings(settings), console=Console(quiet=True))


def _by_trl(folder: Path, rows: list[dict[str, str]], dtype: str, batch_size: int, method: str, reference: str) -> None:
    from peft import get_peft_model
    from trl import DPOConfig, DPOTrainer

    kinds: dict[str, PeftConfig] = {
        "DiaBlo": DiabloConfig(num_blocks=64, target_modules=list(PAPER_TARGETS), task_type="CAUSAL_LM"),
        "LoRA": LoraConfig(r=8, target_modules=list(PAPER_TARGETS), task_type="CAUSAL_LM"),
    }
    is_full = method == "full"
    name, of_weights = resolve_model(MODEL), torch.float32 if is_full else parse_dtype(dtype)
    model = load_model(name, of_weights)
    options: dict[str, Any] = {}
    if reference == "two models":
        options["ref_model"] = load_model(name, of_weights)
    if reference == "adapter off":
        options["peft_config"] = kinds[method]
    elif not is_full:
        model = get_peft_model(model, kinds[method])
    settings = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        learning_rate=1e-4,
        bf16=dtype == "bf16",
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    tokenizer = load_tokenizer(name)
    trainer = DPOTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **options
    )
    trainer.train()


@app.callback(invoke_without_command=True)
def every(
    context: typer.Context,
    dtype: Dtype = "bf16",
    batch_size: int = 8,
    ways: Annotated[str, typer.Option(help="Separated by semicolons.")] = ";".join(WAYS),
    out: Path | None = None,
) -> None:
    """Measure every way."""
    if context.invoked_subcommand is not None:
        return
    results: list[dict[str, Any]] = []
    for way in ways.split(";"):
        command = [sys.executable, "-m", "benchmarks.preferences", "one", way, dtype, str(batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append({"way": way, **json.loads(done.stdout.strip().splitlines()[-1])})
        print(results[-1])
    print_table(
        ["way", "parameters, MB", "peak, MB", "forwards of a run", "of them learning"],
        [[r["way"], r["held"] / 1e6, r["peak"] / 1e6, r["forwards"], r["learning"]] for r in results],
    )
    settings = {"model": MODEL, "dtype": dtype, "batch_size": batch_size, "steps": STEPS}
    write_record(out or Path(f"docs/results/preferences-cpu-{dtype}.json"), QUESTION, settings, results)


if __name__ == "__main__":
    app()
