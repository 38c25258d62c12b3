"""The choice of a learning rate from a grid. The grid is extended where its best rate lies at an edge."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

MOST_EXTENSIONS = 6
"""By how many steps a grid is extended on each of its sides at most."""

_FACTOR_OF_ONE = 2.0


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        losses: validation loss by learning rate, in ascending order of rates, of one seed or the mean over several. The
            loss is infinite where a training diverged, and None where a run failed.
        extended: the rates by which the grid was extended.
        best: the rate of the lowest loss; None where every run failed or diverged.
        edge: ``"lowest"`` or ``"highest"`` where the best rate is the lowest or the highest of all that were tried. A
            better rate may then lie beyond it. None where the best rate lies inside, or where there is none.
    """

    losses: dict[float, float | None]
    extended: list[float]
    best: float | None
    edge: str | None


def sweep(rates: Sequence[float], measure: Callable[[Sequence[float]], list[float | None]]) -> Sweep:
    """Find the best learning rate.

    As long as the best rate is at an edge of the grid, one more rate is tried beyond that edge, at most
    :data:`MOST_EXTENSIONS` on each side. See :func:`beyond_edge`.

    Args:
        rates: the grid.
        measure: trains with each of some rates and returns the validation losses, each None where a run failed.
    """
    grid = sorted(rates)
    losses = dict(zip(grid, map(_comparable, measure(grid)), strict=True))
    extended: list[float] = []
    steps: Counter[str] = Counter()
    while (edge := _edge(losses)) is not None and steps[edge] < MOST_EXTENSIONS:
        rate = beyond_edge(losses, edge)
        losses[rate] = _comparable(*measure([rate]))
        extended.append(rate)
        steps[edge] += 1
    best = best_rate(losses)
    return Sweep(dict(sorted(losses.items())), extended, best, _edge(losses))


def mean_loss(losses: Sequence[float | None]) -> float | None:
    """The mean over the seeds of one rate; None where one of them failed."""
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if len(known) == len(losses) else None


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest finite loss; None where no loss is finite."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


def beyond_edge(rates: Iterable[float], edge: str) -> float:
    """The next rate beyond the ``"lowest"`` or ``"highest"`` rate of a grid.

    The next rate is the edge's rate times one step. The step is the ratio of the two outermost rates at that edge. With
    only one rate in the grid the step is 2.
    """
    outer, *inner = sorted(rates, reverse=edge == "highest")
    factor = outer / inner[0] if inner else _FACTOR_OF_ONE
    return float(f"{outer * factor:.6g}")


def _edge(losses: Mapping[float, float | None]) -> str | None:
    best = best_rate(losses)
    return None if best is None else {min(losses): "lowest", max(losses): "highest"}.get(best)


def _comparable(loss: float | None) -> float | None:
    return math.inf if loss is not None and math.isnan(loss) else loss
