"""The figure of a comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MOST_RATIO = 3
"""A loss over learning rates is drawn up to this many times the lowest, so that a run that diverged hides nothing."""
_MOST_TICKS = 6
"""So many learning rates have a label each; more have those of the powers of ten alone."""


def plot_comparison(path: Path, record: Mapping[str, Any]) -> None:
    """Draw what a comparison has found, as a PNG.

    Above: the score and the test loss of each method, with the standard deviation over the seeds and the best method on
    top; full fine-tuning is drawn hollow, since it trains more parameters than the others. Below: the validation loss
    over the learning rate, the loss over the steps, and the test loss over training time and over peak memory. Where
    there is neither a score nor a loss, no figure is written and an old one is deleted.

    Args:
        path: where to write.
        record: what :func:`diablo.comparison.summary.summarize` returns.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = [
        (name, title, factor)
        for name, title, factor in (
            ("score", "test score (%)", 100),
            ("test_loss", f"test loss ({record['loss_unit']})", 1),
        )
        if any(method[name] for method in record["methods"])
    ]
    if not figures:
        path.unlink(missing_ok=True)
        return
    methods = record["methods"]
    colours = {method["method"]: f"C{number}" for number, method in enumerate(methods)}
    height = 1.2 + 0.4 * len(methods)
    drawn = pyplot.figure(figsize=(14, height + 3.5), layout="constrained")
    halves: Any = drawn.subfigures(2, 1, height_ratios=(height, 3.5))
    above, below = halves
    for place, (axes, (name, title, factor)) in enumerate(
        zip(above.subplots(1, len(figures), sharey=True, squeeze=False)[0], figures, strict=True)
    ):
        _draw_figures(axes, methods, name, factor, colours)
        axes.set_xlabel(title)
        if place == 0:
            names = [f"{method['method']}, {method['trained_parameters'] / 1e6:.3g} M" for method in methods[::-1]]
            axes.set_yticks(range(len(methods)), names)
            axes.set_ylim(-0.5, len(methods) - 0.5)
    rates, steps, time, memory = below.subplots(1, 4)
    _draw_rates(rates, record, colours)
    _draw_steps(steps, record, colours)
    _draw_cost(time, methods, "training_seconds", 1, "training (s)", colours)
    _draw_cost(memory, methods, "peak_memory_bytes", 1e-9, "peak memory (GB)", colours)
    rates.set_ylabel(f"loss ({record['loss_unit']})")
    rates.legend(fontsize="small")
    drawn.savefig(path, dpi=130)
    pyplot.close(drawn)


def _fill(method: Mapping[str, Any]) -> str | None:
    return "none" if method["settings"]["name"] == "full" else None


def _draw_figures(
    axes: Any, methods: Sequence[Mapping[str, Any]], name: str, factor: float, colours: Mapping[str, str]
) -> None:
    for place, method in enumerate(reversed(methods)):
        if spread := method[name]:
            axes.errorbar(
                spread["mean"] * factor,
                place,
                xerr=(spread["deviation"] or 0) * factor,
                fmt="o",
                capsize=4,
                color=colours[method["method"]],
                markerfacecolor=_fill(method),
            )
    axes.grid(axis="x", alpha=0.3)


def _draw_rates(axes: Any, record: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    methods = record["methods"]
    lowest = math.inf
    for method in methods:
        swept = [(each["learning_rate"], each["validation_loss"]) for each in method["sweep"]]
        finite = sorted((rate, loss) for rate, loss in swept if loss is not None and math.isfinite(loss))
        if not finite:
            continue
        lowest = min(lowest, *(loss for _, loss in finite))
        axes.plot(*zip(*finite, strict=True), "o-", color=colours[method["method"]], label=method["method"])
    of_seeds = "first seed" if len(record["settings"]["rate_seeds"]) == 1 else "mean over the seeds"
    axes.set(xscale="log", xlabel="learning rate", title=f"validation loss, {of_seeds}")
    rates = sorted({each["learning_rate"] for method in methods for each in method["sweep"]})
    if len(rates) <= _MOST_TICKS:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    if math.isfinite(lowest) and axes.get_ylim()[1] > _MOST_RATIO * lowest > 0:
        axes.set_ylim(top=_MOST_RATIO * lowest)


def _draw_steps(axes: Any, record: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    tested = [run for run in record["runs"] if run["stage"] == "test" and run["failure"] is None]
    # Held-out losses of the start and the end alone are no curve.
    name = "held_out_losses" if all(len(run["held_out_losses"]) > 2 for run in tested) else "training_losses"
    for method in record["methods"]:
        by_step: dict[int, list[float]] = {}
        for run in tested:
            if run["method"] == method["method"]:
                for step, loss in run[name]:
                    by_step.setdefault(step, []).append(loss)
        steps = sorted(by_step)
        axes.plot(steps, [statistics.fmean(by_step[step]) for step in steps], color=colours[method["method"]])
    what = "test loss" if name == "held_out_losses" else "training loss"
    axes.set(xlabel="step", title=f"{what}, mean over the seeds")


def _draw_cost(
    axes: Any,
    methods: Sequence[Mapping[str, Any]],
    cost: str,
    factor: float,
    label: str,
    colours: Mapping[str, str],
) -> None:
    for method in methods:
        if method["test_loss"] and method[cost]:
            axes.plot(
                method[cost]["mean"] * factor,
                method["test_loss"]["mean"],
                "o",
                color=colours[method["method"]],
                markerfacecolor=_fill(method),
            )
    axes.set(xlabel=label, title="test loss")
    axes.grid(alpha=0.3)
