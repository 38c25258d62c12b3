"""The head that a recipe's rows need: its labels, which are found in the rows, and what of them does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diablo.data.faults import name_places
from diablo.data.rows import Row
from diablo.errors import UserError, shortened
from diablo.models.folders import adapter_folder
from diablo.models.heads import Head, labels_of
from diablo.planning.compared import check_compared
from diablo.planning.rows import Rows
from diablo.recipes.recipe import Recipe

_MOST_LABELS_NAMED = 12


def find_head(recipe: Recipe, rows: Rows) -> Head | None:
    """The head that is to be trained.

    Args:
        recipe: the recipe.
        rows: its rows, by what they are for.

    Returns:
        The head; None where the recipe trains a language model. Labels that are not given are those of the adapter that
        is gone on from, or else those of the training rows, sorted.

    Raises:
        UserError: there are fewer than two labels, or a row has a label that is none of them.
    """
    objective: Any = recipe.objective
    if objective.head is None:
        return None
    if objective.rows == "texts":
        check_compared(recipe, rows)
    if objective.rows not in ("labelled", "tagged"):
        return Head(objective.head)
    several = getattr(objective, "multi_label", False)
    if objective.rows == "labelled":
        _check_lists([*rows.train, *rows.held_out], several)
    known, whose = objective.labels, "objective.labels"
    if known is None and recipe.adapter is not None:
        known, whose = labels_of(adapter_folder(recipe.adapter)) or None, "the adapter"
    if known is not None:
        _check_known(rows.train, known, "training", f"{whose} has {_listed(known)}", "add them, or mend the rows")
        _check_known(rows.held_out, known, "held-out", f"{whose} has {_listed(known)}", "add them, or mend the rows")
        return Head(objective.head, tuple(known), several)
    found = sorted({label for row in rows.train for label in labels_in(row)}, key=_by_number_or_name)
    if len(found) < 2:
        what = f"all have the label {found[0]!r}" if found else "none has a label"
        raise UserError(
            f"data.train: found {len(rows.train)} training rows of which {what}, and a classifier needs two labels or "
            "more; give rows of others, or say which labels there are with objective.labels."
        )
    mend = "give training rows of them, or say which labels there are with objective.labels"
    _check_known(rows.held_out, found, "held-out", f"the training rows have {_listed(found)}", mend)
    return Head(objective.head, tuple(found), several)


def labels_in(row: Row) -> tuple[str, ...]:
    """The labels of a row or of its words."""
    return row.label if isinstance(row.label, tuple) else (str(row.label),)


def describe_counts(counts: Mapping[str, int]) -> str:
    """Labels with their counts, in a line."""
    parts = [f"{label} {count:,}" for label, count in counts.items()]
    more = f" and {len(parts) - _MOST_LABELS_NAMED} more" if len(parts) > _MOST_LABELS_NAMED else ""
    return ", ".join(parts[:_MOST_LABELS_NAMED]) + more


def _check_lists(rows: Sequence[Row], several: bool) -> None:
    other = [row for row in rows if isinstance(row.label, tuple) != several]
    if other and several:
        raise UserError(
            f"objective.multi_label: found true, and {len(other)} rows have a label that is no list "
            f"({name_places(other)}); give a list of labels in each row, or leave it out."
        )
    if other:
        raise UserError(
            f"objective.multi_label: found false, and {len(other)} rows have a list of labels ({name_places(other)}); "
            "set it to true, or give each row one label."
        )


def _check_known(rows: Sequence[Row], known: Sequence[str], what: str, whose: str, mend: str) -> None:
    strangers = [row for row in rows if not set(labels_in(row)) <= set(known)]
    if strangers:
        found = sorted({label for row in strangers for label in labels_in(row)} - set(known))
        raise UserError(
            f"data: {len(strangers)} {what} rows have {_listed(found)} as a label ({name_places(strangers)}), and "
            f"{whose}; {mend}."
        )


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _MOST_LABELS_NAMED} more" if len(labels) > _MOST_LABELS_NAMED else ""
    return ", ".join(shortened(label) for label in labels[:_MOST_LABELS_NAMED]) + more


def _by_number_or_name(label: str) -> tuple[bool, int, str]:
    is_number = label.removeprefix("-").isdecimal()
    return not is_number, int(label) if is_number else 0, label
