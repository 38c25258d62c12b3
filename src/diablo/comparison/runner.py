"""The runs of a comparison, one after the other, each in a process of its own. A finished run is not repeated."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape

from diablo.comparison.plan import Comparison, Run
from diablo.comparison.summary import describe_run, summarize, write_comparison
from diablo.comparison.sweep import Sweep, sweep
from diablo.errors import UserError
from diablo.recipes.recipe import Recipe
from diablo.records.results import changed_settings, kept_loss, read_run, write_json

if TYPE_CHECKING:
    from diablo.comparison.contenders import Contender

Runner = Callable[[Recipe], str | None]
"""Carries out a recipe. It returns why the run failed, or None where it did not fail."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        run: the run.
        record: the content of its ``run.json``; empty where it failed.
        failure: why it failed; None where it did not.
    """

    run: Run
    record: dict[str, Any]
    failure: str | None = None

    @property
    def held_out_loss(self) -> float | None:
        """The loss per token, in nats, on the rows that the run is judged by, after training; None without a record."""
        return kept_loss(self.record["training"]) if self.record else None


def compare(comparison: Comparison, *, console: Console | None = None, runner: Runner | None = None) -> dict[str, Any]:
    """Carry out a comparison, or go on with one that was interrupted.

    For each method, the learning rate is chosen on the validation rows. Then the method is run with every seed and
    judged on the test rows. At the end the folder holds ``comparison.json``, ``comparison.md``, ``comparison.png`` and
    ``runs/``, with the recipe, the log and the output folder of each run. The adapter of a run of the sweep is deleted
    as soon as the run's loss is known.

    Args:
        comparison: the comparison.
        console: where progress is written; standard error where None.
        runner: carries out one run. Where None, each run gets a process of its own, so that its peak memory is measured
            alone and a crash ends no other run.

    Returns:
        The content of ``comparison.json``.

    Raises:
        UserError: the folder holds something else, or a comparison with other settings.
    """
    console = console or Console(stderr=True)
    runner = runner or run_in_subprocess
    open_folder(comparison)
    sweeps: dict[str, Sweep] = {}
    outcomes: list[Outcome] = []
    record: dict[str, Any] = {}

    def carry_out(run: Run) -> Outcome:
        outcomes.append(_carry_out(run, runner, console))
        return outcomes[-1]

    for contender in comparison.contenders:
        found = _sweep(comparison, contender, carry_out)
        sweeps[contender.title] = found
        if found.best is not None:
            for seed in comparison.seeds:
                carry_out(comparison.run(contender, "test", found.best, seed))
        described = [describe_run(each.run, each.record, each.failure) for each in outcomes]
        record = summarize(comparison, sweeps, described, [each.record for each in outcomes if each.record])
        write_comparison(comparison.folder, record)
    return record


def _sweep(comparison: Comparison, contender: Contender, carry_out: Callable[[Run], Outcome]) -> Sweep:
    seed = comparison.seeds[0]
    return sweep(
        comparison.rates,
        lambda rate: carry_out(comparison.run(contender, "validation", rate, seed)).held_out_loss,
    )


def open_folder(comparison: Comparison) -> None:
    """Make the comparison's folder. Where it exists already, check that it holds this very comparison.

    Raises:
        UserError: the folder holds something else, or a comparison with other settings.
    """
    folder, path = comparison.folder, comparison.folder / "settings.json"
    if path.is_file():
        changed = changed_settings(json.loads(path.read_text(encoding="utf-8")), comparison.settings)
        if changed:
            raise UserError(
                f"{', '.join(changed)}: changed since the comparison in {str(folder)!r} was started; set them back as "
                f"{path} has them, or give another folder with --out."
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out: {str(folder)!r} has files of something else; give a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, comparison.settings)


def finished_record(run: Run) -> dict[str, Any]:
    """The record of a finished run; empty where the run is not finished, or was made with other settings."""
    path = run.recipe.output / "run.json"
    if not path.is_file():
        return {}
    record = read_run(path)
    changed = changed_settings(record["recipe"], run.recipe.model_dump(mode="json"))
    return record if set(changed) <= {"output"} else {}


def run_in_subprocess(recipe: Recipe) -> str | None:
    """Carry out a recipe with ``diablo train`` in a process of its own. It writes to a log beside its output folder.

    Returns:
        Why the run failed: its error message, or the last line of its log. None where it did not fail.
    """
    settings, log = (recipe.output.with_name(f"{recipe.output.name}.{ending}") for ending in ("yaml", "log"))
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    with log.open("w", encoding="utf-8") as lines:
        command = [sys.executable, "-m", "diablo_cli", "train", str(settings)]
        with _raised_sigterm():
            status = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, check=False).returncode
    return None if status == 0 else f"{_reason(log)} (exit status {status}; {log})"


@contextmanager
def _raised_sigterm() -> Iterator[None]:
    """Has SIGTERM raise, so that it ends the child as well, which would go on training for nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it wrote nothing"])[-1]


def _carry_out(run: Run, runner: Runner, console: Console) -> Outcome:
    record, failure = finished_record(run), None
    if not record:
        failure = runner(run.recipe)
        record = finished_record(run) if failure is None else {}
        if failure is None and not record:
            failure = "it left no record"
        _say(console, run, record, failure)
    if run.stage == "validation":
        for name in ("adapter", "model"):
            shutil.rmtree(run.recipe.output / name, ignore_errors=True)
    return Outcome(run, record, failure)


def _say(console: Console, run: Run, record: dict[str, Any], failure: str | None) -> None:
    what = f"{run.method}, learning rate {run.rate:g}, seed {run.seed}"
    if failure is not None:
        console.print(f"failed  {what}: {escape(failure)}", highlight=False, soft_wrap=True)
        return
    kept, seconds = kept_loss(record["training"]), record["timings"]["train_seconds"]
    loss = "" if kept is None else f"{run.stage} loss {kept:.4f}, "
    console.print(f"done    {what}: {loss}trained in {seconds:.0f} s", highlight=False, soft_wrap=True)
