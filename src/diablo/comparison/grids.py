"""The learning rates that are tried: one grid for all methods, and grids of single methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diablo.errors import UserError, did_you_mean

DEFAULT_RATES = (2e-4, 5e-4, 1e-3, 2e-3)

DEFAULT_OWN_RATES = {"full": (2e-5, 5e-5, 1e-4, 2e-4)}
"""The grids of methods whose best rates lie far from those of the others."""


@dataclass(frozen=True)
class Grids:
    """The grid of each method.

    Attributes:
        common: the learning rates of all methods that have no grid of their own, in ascending order.
        own: grids of single methods, by the method's name.
    """

    common: list[float]
    own: dict[str, list[float]]

    def of(self, method: str) -> list[float]:
        """The grid of a method."""
        return self.own.get(method, self.common)

    def in_words(self, methods: Sequence[str]) -> str:
        """The rates of these methods, such as ``0.001, 0.002; full: 0.0001, 0.0002``."""
        common = [_joined(self.common)] if set(methods) - self.own.keys() else []
        return "; ".join([*common, *(f"{method}: {_joined(rates)}" for method, rates in self.own.items())])


def make_grids(
    methods: Sequence[str], common: Sequence[float] | None, own: Mapping[str, Sequence[float]] | None
) -> Grids:
    """Check and complete the grids of a comparison.

    Args:
        methods: the methods that are compared.
        common: the grid of all methods without one of their own; None for the defaults, by which full fine-tuning has a
            grid of its own.
        own: grids by the names of methods. They go before the defaults.

    Raises:
        UserError: a grid has no rates, equal ones or one that is not above 0, or it is that of a method which is not
            compared.
    """
    own = dict(own or {})
    for method in own:
        if method not in methods:
            raise UserError(
                f"--lrs: found a grid of {method!r}, which is not compared; the methods are {', '.join(methods)}."
                f"{did_you_mean(method, methods)}"
            )
    if common is None:
        common = DEFAULT_RATES
        own = {name: rates for name, rates in DEFAULT_OWN_RATES.items() if name in methods} | own
    for rates in (common, *own.values()):
        _check(rates)
    return Grids(sorted(common), {method: sorted(rates) for method, rates in own.items()})


def parse_rates(texts: Sequence[str]) -> tuple[list[float] | None, dict[str, list[float]]]:
    """Read grids as they are written on the command line: rates, separated by commas, and ``METHOD=RATES``.

    Returns:
        The grid of all methods, or None where none is among them, and the grids of single methods.

    Raises:
        UserError: a rate is not a number, or a grid is given twice.
    """
    grids: dict[str, list[float]] = {}
    for text in texts:
        # The name of a type of PEFT can have settings, with a = of their own.
        method, _, rates = text.rpartition("=")
        if method in grids:
            of = f"of {method!r}" if method else "of all methods"
            raise UserError(f"--lrs: found a second grid {of}, {rates!r}; give its rates in one, separated by commas.")
        try:
            grids[method] = [float(number) for number in rates.split(",")]
        except ValueError:
            raise UserError(
                f"--lrs: found {text!r}; give numbers, separated by commas, with METHOD= in front of them for one "
                "method alone."
            ) from None
    return grids.pop("", None), grids


def _check(rates: Sequence[float]) -> None:
    # The names of the runs' folders have the rates with six digits. Two rates with the same digits would share one.
    if (
        not rates
        or len({f"{rate:g}" for rate in rates}) < len(rates)
        or not all(rate > 0 and math.isfinite(rate) for rate in rates)
    ):
        raise UserError(f"--lrs: found {_joined(rates) or 'none'}; give different numbers above 0.")


def _joined(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
