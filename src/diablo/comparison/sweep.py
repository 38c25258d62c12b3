"""The choice of a learning rate: a grid, extended where its best rate lies at an edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MOST_EXTENSIONS = 2
_FACTOR_OF_ONE = 2.0


@dataclass(frozen=True)
class Sweep:
    """The outcome of a sweep.

    Attributes:
        losses: validation loss by learning rate; infinite where it diverged, None where the run failed.
        extended: the rates by which the grid was extended.
        best: the rate of the lowest loss; None where every run failed or diverged.
        edge: ``"lowest"`` or ``"highest"`` where the best rate is that of all that were tried, so that a better one may
            lie beyond; None where it lies inside.
    """

    losses: dict[float, float | None]
    extended: list[float]
    best: float | None
    edge: str | None


def sweep(rates: Sequence[float], measure: Callable[[float], float | None]) -> Sweep:
    """Find the best learning rate.

    Where it is at the edge of the grid, the grid is extended by one step of its own there, at most twice.

    Args:
        rates: the grid.
        measure: the validation loss at a rate, or None where the run failed.
    """
    losses = {rate: _comparable(measure(rate)) for rate in sorted(rates)}
    extended: list[float] = []
    while len(extended) < MOST_EXTENSIONS and (rate := beyond_edge(losses)) is not None:
        losses[rate] = _comparable(measure(rate))
        extended.append(rate)
    best = best_rate(losses)
    return Sweep(dict(sorted(losses.items())), extended, best, _edge(losses))


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest finite loss; None where there is none."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


def beyond_edge(losses: Mapping[float, float | None]) -> float | None:
    """The next rate beyond the edge that the best rate lies at, one step of the grid away; None where it lies inside.

    The step is the ratio of the two rates at that edge, or 2 where there is only one.
    """
    edge = _edge(losses)
    if edge is None:
        return None
    outer, *inner = sorted(losses, reverse=edge == "highest")
    factor = outer / inner[0] if inner else _FACTOR_OF_ONE
    return float(f"{outer * factor:.6g}")


def _edge(losses: Mapping[float, float | None]) -> str | None:
    best = best_rate(losses)
    return None if best is None else {min(losses): "lowest", max(losses): "highest"}.get(best)


def _comparable(loss: float | None) -> float | None:
    return math.inf if loss is not None and math.isnan(loss) else loss
