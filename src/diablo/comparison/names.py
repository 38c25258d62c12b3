"""The names of the methods and of the optimizers that can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from diablo.errors import UserError, did_you_mean
from diablo.recipes.methods import METHODS
from diablo.recipes.training import check_optimizer_name

OFFERED = [name for name in METHODS if name != "peft"]
"""The methods that have a name of their own."""

FORM = "peft:TYPE:KEY, such as peft:GRALORA:r, with further settings behind it as :key=value"
"""How a type of PEFT is named."""


def check_methods(names: Sequence[str]) -> None:
    """Check the names of the methods that are to be compared; which types there are, PEFT is asked later.

    Raises:
        UserError: one is not known, or none is given, or one is given twice.
    """
    for name in names:
        if name not in OFFERED and not name.startswith("peft:"):
            raise UserError(
                f"--methods: found {name!r}; allowed: {', '.join(OFFERED)}, {FORM}.{did_you_mean(name, OFFERED)}"
            )
    if not names or len(set(names)) < len(names):
        raise UserError(f"--methods: found {', '.join(names) or 'none'}; name each method once.")


def check_optimizers(names: Sequence[str]) -> None:
    """Check the names of the optimizers that are to be compared.

    Raises:
        UserError: one is not known, or none is given, or one is given twice.
    """
    try:
        for name in names:
            check_optimizer_name("--optimizers", name)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not names or len(set(names)) < len(names):
        raise UserError(f"--optimizers: found {', '.join(names) or 'none'}; name each optimizer once.")
