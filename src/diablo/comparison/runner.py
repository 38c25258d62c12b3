"""The runs of a comparison, in their order or several side by side. A finished run is not repeated."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from diablo.comparison.grids import Grids
from diablo.comparison.plan import Comparison, Run
from diablo.comparison.processes import Processes, raised_sigterm, shares_of, side_by_side
from diablo.comparison.summary import describe_run, summarize, write_comparison
from diablo.comparison.sweep import Sweep, mean_loss, sweep
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


@dataclass(frozen=True)
class _Contest:
    """All runs of one contender, in their order, and the sweep that chose its learning rate."""

    sweep: Sweep
    outcomes: list[Outcome]


def compare(
    comparison: Comparison, *, console: Console | None = None, runner: Runner | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Carry out a comparison, or go on with one that was interrupted.

    For each method, the learning rate is chosen on the validation rows. Then the method is run with every seed and
    judged on the test rows. At the end the folder holds ``comparison.json``, ``comparison.md``, ``comparison.png`` and
    ``runs/``, with the recipe, the log and the output folder of each run. The adapter of a run of the sweep is deleted
    as soon as the run's loss is known.

    Args:
        comparison: the comparison.
        console: where progress is written; standard error where None.
        runner: carries out one run, and is called in as many threads at once as there are jobs. Where None, each run
            gets a process of its own, so that its peak memory is measured alone and a crash ends no other run.
        jobs: how many runs go on at once. The rates of a grid and the seeds do not depend on each other, nor do the
            methods. Several CUDA GPUs are given to the jobs in turn.

    Returns:
        The content of ``comparison.json``.

    Raises:
        UserError: fewer than one job; the folder holds something else, or a comparison with other settings.
    """
    if jobs < 1:
        raise UserError(f"--jobs: found {jobs}; give how many runs go on at once, an integer of at least 1.")
    console = console or Console(stderr=True)
    most_jobs = open_folder(comparison, jobs)
    processes = Processes(shares_of(jobs))
    contests: dict[str, _Contest] = {}
    record: dict[str, Any] = {}
    slots, writing = threading.Semaphore(jobs), threading.Lock()

    def carry_out_one(run: Run) -> Outcome:
        with slots:
            return _carry_out(run, runner or processes, console)

    def carry_out(runs: Sequence[Run]) -> list[Outcome]:
        return side_by_side(carry_out_one, runs, jobs)

    def contend(contender: Contender) -> None:
        contest = _contend(comparison, contender, carry_out)
        with writing:
            contests[contender.title] = contest
            record.update(_summarize(comparison, contests, most_jobs))
            write_comparison(comparison.folder, record)

    with raised_sigterm():
        try:
            side_by_side(contend, comparison.contenders, jobs)
        except BaseException:
            processes.end()
            raise
    return record


def _contend(
    comparison: Comparison, contender: Contender, carry_out: Callable[[Sequence[Run]], list[Outcome]]
) -> _Contest:
    outcomes: list[Outcome] = []
    seeds = comparison.rate_seeds

    def measure(rates: Sequence[float]) -> list[float | None]:
        tried = carry_out([comparison.run(contender, "validation", rate, seed) for rate in rates for seed in seeds])
        outcomes.extend(tried)
        return [mean_loss([each.held_out_loss for each in tried if each.run.rate == rate]) for rate in rates]

    found = sweep(comparison.grids.of(contender.name), measure)
    if found.best is not None:
        outcomes += carry_out([comparison.run(contender, "test", found.best, seed) for seed in comparison.seeds])
    return _Contest(found, outcomes)


def _summarize(comparison: Comparison, contests: dict[str, _Contest], jobs: int) -> dict[str, Any]:
    """The record of the contenders that are through, with their runs in the order of the plan."""
    titles = [contender.title for contender in comparison.contenders if contender.title in contests]
    outcomes = [outcome for title in titles for outcome in contests[title].outcomes]
    return summarize(
        comparison,
        {title: contests[title].sweep for title in titles},
        [describe_run(each.run, each.record, each.failure) for each in outcomes],
        [each.record for each in outcomes if each.record],
        jobs,
    )


def open_folder(comparison: Comparison, jobs: int) -> int:
    """Make the comparison's folder. Where it exists already, check that it holds this comparison, or a part of it.

    Returns:
        How many of its runs went on at once at most, here and before.

    Raises:
        UserError: the folder holds something else, or a comparison with other settings, or with methods, optimizers,
            seeds or rates that are left out now.
    """
    folder, path = comparison.folder, comparison.folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        extended = _may_be_extended(before)
        fixed = {name: value for name, value in comparison.settings.items() if name not in extended}
        changed = changed_settings(before, fixed)
        if changed:
            raise UserError(
                f"{', '.join(changed)}: changed since the comparison in {str(folder)!r} was started; set them back as "
                f"{path} has them, or give another folder with --out."
            )
        _check_extended(before, comparison)
        jobs = max(jobs, before["jobs"])
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out: {str(folder)!r} has files of something else; give a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, comparison.settings | {"jobs": jobs})
    return jobs


def _may_be_extended(before: Mapping[str, Any]) -> set[str]:
    """The settings of which a comparison may have more than before, since they change no run that is finished."""
    settings = {"methods", "seeds", "rate_seeds", "lrs", "own_lrs"}
    # A method that is run with several optimizers has other names than one that is run with the recipe's own.
    return settings if before["optimizers"] is None else settings | {"optimizers"}


def _check_extended(before: Mapping[str, Any], comparison: Comparison) -> None:
    """Refuse to leave out what the comparison had before: its record would lack runs that are finished."""
    now, had = comparison.settings, Grids(before["lrs"], before["own_lrs"])
    pairs = [
        *((f"--{name}", before[name] or [], now[name] or []) for name in ("methods", "optimizers")),
        *(
            (f"--{name.replace('_', '-')}", *([f"seed {seed}" for seed in each[name]] for each in (before, now)))
            for name in ("seeds", "rate_seeds")
        ),
        *(("--lrs", *(_tried(grids, name) for grids in (had, comparison.grids))) for name in before["methods"]),
    ]
    for option, earlier, later in pairs:
        left_out = [value for value in earlier if value not in later]
        if left_out:
            raise UserError(
                f"{option}: the comparison in {str(comparison.folder)!r} also has {', '.join(left_out)}; it can be "
                "extended but not cut. Give that too, or another folder with --out."
            )


def _tried(grids: Grids, method: str) -> list[str]:
    return [f"{rate:g} for {method}" for rate in grids.of(method)]


def finished_record(run: Run) -> dict[str, Any]:
    """The record of a finished run; empty where the run is not finished, or was made with other settings."""
    path = run.recipe.output / "run.json"
    if not path.is_file():
        return {}
    record = read_run(path)
    changed = changed_settings(record["recipe"], run.recipe.model_dump(mode="json"))
    return record if set(changed) <= {"output"} else {}


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
