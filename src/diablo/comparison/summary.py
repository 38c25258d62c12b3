"""The figures of a comparison: means and deviations over seeds, the table and the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diablo.comparison.differences import paired_difference, read_solved
from diablo.comparison.figure import plot_comparison
from diablo.comparison.grids import Grids
from diablo.comparison.plan import Comparison, Run
from diablo.comparison.sweep import Sweep
from diablo.records.results import kept_loss, write_json

HEADERS = (
    "method",
    "size",
    "trained parameters",
    "learning rate",
    "test score",
    "test loss",
    "training, s",
    "peak memory, MB",
    "file, MB",
    "forgetting",
)

_FIGURES = (
    "score",
    "test_loss",
    "training_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "adapter_bytes",
    "forgetting",
)


def describe_run(run: Run, record: Mapping[str, Any], failure: str | None) -> dict[str, Any]:
    """The figures of a run.

    Args:
        run: the run.
        record: the content of its ``run.json``.
        failure: why it failed; None where it did not. A failed run has no figures.
    """
    described: dict[str, Any] = {
        "method": run.method,
        "stage": run.stage,
        "learning_rate": run.rate,
        "seed": run.seed,
        "folder": f"runs/{run.recipe.output.name}",
        "failure": failure,
    }
    if failure is not None:
        return described
    training, general = record["training"], record["general_loss"]
    scores = {task: score[score["headline"]] for task, score in record["scores"].get("after", {}).items()}
    return described | {
        "trained_parameters": record["parameters"]["trainable"],
        f"{run.stage}_loss": kept_loss(training),
        "score": statistics.fmean(scores.values()) if scores else None,
        "scores": scores,
        "solved": read_solved(run.recipe.output / "answers-after.jsonl", scores),
        "training_seconds": record["timings"]["train_seconds"],
        "tokens_per_second": training["tokens_per_second"],
        "peak_memory_bytes": training["peak_memory_bytes"],
        "adapter_bytes": record["adapter_bytes"],
        "forgetting": general["after"] - general["before"] if general else None,
        "training_losses": training["loss"],
        "held_out_losses": training["held_out_loss"],
    }


def summarize(
    comparison: Comparison,
    sweeps: Mapping[str, Sweep],
    runs: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    jobs: int,
) -> dict[str, Any]:
    """The content of ``comparison.json``.

    Args:
        comparison: the comparison.
        sweeps: the outcomes of the sweeps by the contender's title. A contender that is missing here has not been run
            yet.
        runs: the figures of every run, from :func:`describe_run`.
        records: the contents of the runs' ``run.json``. Machines and versions are taken from them.
        jobs: how many runs went on at once at most.
    """
    methods: list[dict[str, Any]] = []
    for contender in comparison.contenders:
        if contender.title not in sweeps:
            continue
        found = sweeps[contender.title]
        own = [run for run in runs if run["method"] == contender.title]
        tested = [run for run in own if run["stage"] == "test"]
        tried = [(rate, [run for run in own if _chooses(run, rate)], loss) for rate, loss in found.losses.items()]
        methods.append(
            {
                "method": contender.title,
                "optimizer": (contender.optimizer or comparison.recipe.training.optimizer).name,
                "settings": contender.method.model_dump(mode="json"),
                "size": contender.size,
                "trained_parameters": contender.trained,
                "deviation_from_budget": contender.deviation,
                "learning_rate": found.best,
                "sweep": [
                    {
                        "learning_rate": rate,
                        "validation_loss": loss,
                        "validation_losses": [run.get("validation_loss") for run in at_rate],
                    }
                    for rate, at_rate, loss in tried
                ],
                "extended_by": found.extended,
                "at_edge": found.edge,
                "seeds": sum(run["failure"] is None for run in tested),
                **{name: _spread([run.get(name) for run in tested]) for name in _FIGURES},
            }
        )
    ranked = sorted(methods, key=_rank)
    for method in ranked:
        method["below_best"] = _below_best(runs, ranked[0]["method"], method["method"])
    return {
        "settings": comparison.settings,
        "budget": comparison.budget,
        "total_parameters": comparison.total,
        "steps": comparison.steps,
        "jobs": jobs,
        "loss_unit": comparison.recipe.objective.loss_unit,
        "machines": _distinct([record["machine"] for record in records]),
        "versions": _distinct([record["versions"] for record in records]),
        "methods": ranked,
        "runs": list(runs),
    }


def write_comparison(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``comparison.json``, ``comparison.md`` and ``comparison.png``.

    Args:
        folder: where to write.
        record: what :func:`summarize` returns.
    """
    write_json(folder / "comparison.json", dict(record))
    (folder / "comparison.md").write_text(markdown(record), encoding="utf-8")
    plot_comparison(folder / "comparison.png", record)


def table_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table under :data:`HEADERS`, one row for each method, with the best method first."""
    return [_cells(method) for method in record["methods"]]


def notes(record: Mapping[str, Any]) -> list[str]:
    """The notes under the table: how the figures were measured, and which runs failed."""
    settings = record["settings"]
    data, seeds = settings["data"], settings["seeds"]
    grids = Grids(settings["lrs"], settings["own_lrs"])
    scored = sorted({task for run in record["runs"] for task in run.get("scores", {})})
    metrics = f"{'headline metric' if len(scored) == 1 else 'mean of the headline metrics'} of {', '.join(scored)}"
    each = "Every method, with each of the optimizers," if settings["optimizers"] else "Every method"
    rate_seeds = settings["rate_seeds"]
    several = len(rate_seeds) > 1
    said = [
        f"The model is {settings['model']}. A run has {record['steps']} steps. Figures are the mean ± the standard "
        f"deviation over the seeds {', '.join(map(str, seeds))}. "
        + (f"The score is the {metrics} on the test problems. " if scored else "")
        + f"Losses are {'in ' * record['loss_unit'].startswith('nats')}{record['loss_unit']}.",
        f"{each} was run at the learning rates {grids.in_words(settings['methods'])} with seed{'s' * several} "
        f"{', '.join(map(str, rate_seeds))}. The rate with the lowest {'mean ' * several}loss on "
        f"{data['validation_rows']} validation rows was then used for all seeds. These rows were cut from the training "
        f"rows with seed {data['validation_seed']}, and no run is trained or tested on them.",
        _sizes(record),
        "Forgetting is the rise of the loss on general text through training. Training time and peak memory do not "
        "include scoring.",
    ]
    if record["jobs"] > 1:
        said.append(
            f"Up to {record['jobs']} runs went on at once, which disturb each other's training times. The losses and "
            "scores do not depend on it."
        )
    if below := [method for method in record["methods"] if method["below_best"]]:
        said.append(
            f"Points below {record['methods'][0]['method']} on the same test problems: "
            f"{', '.join(map(_say_below, below))}. Here ± is the standard error over the problems, which the deviation "
            "over the seeds does not hold: other problems of the same kind would change the difference by about that."
        )
    for method in record["methods"]:
        if method["extended_by"]:
            rates = " and then by ".join(f"{rate:g}" for rate in method["extended_by"])
            said.append(
                f"{method['method']}: the best rate was at the edge of the grid, so the grid was extended by {rates}."
            )
        if method["at_edge"]:
            said.append(
                f"* {method['method']}: the best rate is the {method['at_edge']} that was tried. A better one may lie "
                "beyond it."
            )
        if tie := _tie(method):
            said.append(tie + ("" if several else " --rate-seeds 3 chooses by the mean over three seeds."))
        if method["learning_rate"] is None:
            said.append(f"{method['method']}: no run of the sweep gave a finite loss.")
    said += [
        f"Failed: {run['method']}, {run['stage']}, learning rate {run['learning_rate']:g}, seed {run['seed']}: "
        f"{run['failure']}"
        for run in record["runs"]
        if run["failure"] is not None
    ]
    return said


def _below_best(runs: Sequence[Mapping[str, Any]], best: str, method: str) -> dict[str, float] | None:
    """By how much the score of a method is below the best one, on the same problems; None where it is not known."""
    solved = [[run["solved"] for run in runs if run["method"] == each and run.get("solved")] for each in (best, method)]
    found = None if method == best else paired_difference(*solved)
    return None if found is None else dict(zip(("difference", "standard_error"), found, strict=True))


def _chooses(run: Mapping[str, Any], rate: float) -> bool:
    """Whether a run is one of those that say how good a rate is."""
    return run["stage"] == "validation" and bool(run["learning_rate"] == rate)


def _tie(method: Mapping[str, Any]) -> str | None:
    """That the best two rates differ by less than the seeds do; None where they differ by more, or it is not known."""
    losses = {each["learning_rate"]: each["validation_loss"] for each in method["sweep"]}
    ranked = sorted((loss, rate) for rate, loss in losses.items() if loss is not None and math.isfinite(loss))
    if len(ranked) < 2:
        return None
    (lowest, best), (second, other) = ranked[:2]
    at_best = next(each["validation_losses"] for each in method["sweep"] if each["learning_rate"] == best)
    over_seeds = _spread(at_best) if len(at_best) > 1 else method["test_loss"]
    if over_seeds is None or over_seeds["deviation"] is None or second - lowest >= over_seeds["deviation"]:
        return None
    return (
        f"{method['method']}: on the validation rows the learning rates {best:g} and {other:g} differ by "
        f"{second - lowest:.4f} in loss. That is less than the deviation over the seeds, "
        f"{over_seeds['deviation']:.4f}, so the choice between the two is by chance."
    )


def _say_below(method: Mapping[str, Any]) -> str:
    below = method["below_best"]
    return f"{method['method']} {100 * below['difference']:.1f} ± {100 * below['standard_error']:.1f}"


def _sizes(record: Mapping[str, Any]) -> str:
    """What is said of the methods' sizes, as far as there are such methods."""
    said, names = [f"DiaBlo trains {record['budget']:,} parameters."], set(record["settings"]["methods"])
    if "full" in names:
        said.append("Full fine-tuning trains all weights.")
    if names - {"diablo", "full"}:
        said.append(
            "Every other method has the size at which it trains the number of parameters that is closest to DiaBlo's."
        )
    if "pissa" in names:
        said.append(
            "PiSSA's file holds twice as many values as PiSSA trains, since it holds the difference to PiSSA's start."
        )
    return " ".join(said)


def markdown(record: Mapping[str, Any]) -> str:
    """The table as Markdown, with the notes under it."""
    lines = [HEADERS, ["---"] * len(HEADERS), *table_rows(record)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n" + "\n".join(f"- {note}" for note in notes(record)) + "\n"


def _cells(method: Mapping[str, Any]) -> list[str]:
    trained, deviation, rate = (
        method[name] for name in ("trained_parameters", "deviation_from_budget", "learning_rate")
    )
    return [
        method["method"],
        method["size"],
        f"{trained:,} ({deviation:+.1%})" if deviation else f"{trained:,}",
        "-" if rate is None else f"{rate:g}" + ("*" if method["at_edge"] else ""),
        _cell(method["score"], "{:.1%}"),
        _cell(method["test_loss"], "{:.4f}"),
        _cell(method["training_seconds"], "{:.0f}", with_deviation=False),
        _cell(method["peak_memory_bytes"], "{:,.0f}", 1e-6, with_deviation=False),
        _cell(method["adapter_bytes"], "{:,.1f}", 1e-6, with_deviation=False),
        _cell(method["forgetting"], "{:+.4f}"),
    ]


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean and sample standard deviation over the seeds that have this figure; None where no seed has it."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 and all(map(math.isfinite, known)) else None
    return {"mean": statistics.fmean(known), "deviation": deviation, "values": known}


def _rank(method: Mapping[str, Any]) -> tuple[float, float]:
    """A key to sort by: the best score comes first, then the lowest loss. A method with neither comes last."""
    figures = (method["score"] and -method["score"]["mean"], method["test_loss"] and method["test_loss"]["mean"])
    score, loss = (math.inf if figure is None or math.isnan(figure) else figure for figure in figures)
    return score, loss


def _cell(spread: Mapping[str, Any] | None, pattern: str, factor: float = 1, *, with_deviation: bool = True) -> str:
    if spread is None:
        return "-"
    text = pattern.format(spread["mean"] * factor)
    if with_deviation and spread["deviation"] is not None:
        text += f" ± {pattern.replace('+', '').format(spread['deviation'] * factor)}"
    return text


def _distinct(items: Sequence[Any]) -> list[Any]:
    return [item for index, item in enumerate(items) if item not in items[:index]]
