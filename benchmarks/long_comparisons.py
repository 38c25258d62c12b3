"""Which method learns best when the runs are long? The comparisons of benchmarks/quality/long-*.yaml, one by one.

    python -m benchmarks.long_comparisons gsm8k --folder DATA/gsm8k --jobs 6
    python -m benchmarks.long_comparisons mawps gsm8k commonsense --folder DATA --dry-run

Every method has its own best rate of a grid in steps of two, and about as many trained parameters as DiaBlo. A
comparison that was interrupted goes on where it stopped, and more methods can be added to it. Each record is a
comparison.json, as diablo compare writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diablo.comparison import DEFAULT_METHODS, compare, plan_comparison
from diablo.recipes.reading import load_recipe
from diablo_cli.reporting import print_comparison, print_comparison_plan
from diablo_cli.shell import quiet

QUALITY = Path(__file__).parent / "quality"
TASKS = ("mawps", "gsm8k", "commonsense")
METHODS = (
    *DEFAULT_METHODS,
    # The best of PEFT's own comparison of methods.
    *("peft:HIRA:r", "peft:LILY:r", "peft:SHIRA:r", "peft:GRALORA:r", "peft:DELORA:r", "peft:RANDLORA:r"),
)
RATES = (1e-3, 2e-3)
OWN_RATES = {"full": (1e-4, 2e-4)}


def main(
    tasks: Annotated[list[str], typer.Argument(help=f"Out of {', '.join(TASKS)}.")],
    folder: Annotated[str | None, typer.Option(help="The data of the tasks; from the hub if not given.")] = None,
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(METHODS),
    seeds: int = 3,
    rate_seeds: Annotated[int, typer.Option(help="With how many of them each learning rate is tried.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs go on at once.")] = 1,
    out: Annotated[Path, typer.Option(help="A folder for the comparisons.")] = Path("runs/long"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run and stop.")] = False,
) -> None:
    """Run the comparison of each task."""
    quiet()
    console = Console()
    names = methods.split(",")
    data = [] if folder is None else [f"data.folder={folder}"]
    comparisons = [
        plan_comparison(
            # The word problems of MAWPS are part of the package.
            load_recipe(QUALITY / f"long-{task}.yaml", [] if task == "mawps" else data),
            methods=names,
            seeds=seeds,
            rate_seeds=rate_seeds,
            rates=RATES,
            own_rates={name: rates for name, rates in OWN_RATES.items() if name in names},
            folder=out / task,
        )
        for task in tasks
    ]
    failed = False
    for comparison in comparisons:
        print_comparison_plan(console, comparison)
        if not dry_run:
            record = compare(comparison, console=console, jobs=jobs)
            print_comparison(console, record, comparison.folder)
            failed |= any(run["failure"] for run in record["runs"])
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
