"""``columns`` of a recipe: which columns of a user's records make the columns of a format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from diablo.data.faults import NoRowError
from diablo.data.reading.formats import FORMATS, name_columns
from diablo.data.rows import RowKind
from diablo.errors import UserError, did_you_mean, first_line, shortened


class Columns:
    """Makes the columns of a format from those of a record.

    Args:
        mapping: for each column of the format, the name of a column or a Jinja template, which has ``{{`` or ``{%`` in
            it and is given the record's columns, and the record itself as ``row``.
        kind: the kind of the rows.

    Raises:
        UserError: the columns are those of no format, or a template is no valid Jinja.
    """

    def __init__(self, mapping: Mapping[str, str], kind: RowKind = "completions") -> None:
        _check_format(mapping, kind)
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_printed
        )
        self._columns = {key: value for key, value in mapping.items() if not _is_template(value)}
        self._templates = {}
        for key, value in mapping.items():
            if _is_template(value):
                try:
                    self._templates[key] = environment.from_string(value)
                except TemplateSyntaxError as error:
                    raise UserError(
                        f"columns: found {shortened(value)} for {key}, which is no valid Jinja ({first_line(error)})."
                    ) from None

    def __call__(self, record: Any) -> Any:
        """The columns that are asked for; what is no record stays as it is.

        Raises:
            NoRowError: a column is missing, or a template fails.
        """
        if not isinstance(record, dict):
            return record
        made = {}
        for key, name in self._columns.items():
            if name not in record:
                raise NoRowError(f"has no column {name!r}", f"it has {name_columns(record)}: mend columns")
            made[key] = _as_text(record[name])
        for key, template in self._templates.items():
            try:
                made[key] = template.render({"row": record} | record)
            except NoRowError:
                raise
            except TemplateError as error:
                raise NoRowError(
                    f"columns: the template of {key} says {shortened(first_line(error))}",
                    f"the row has {name_columns(record)}",
                ) from None
            except Exception as error:  # what an expression can raise on what stands in a row is open-ended
                raise NoRowError(
                    f"columns: the template of {key} fails ({shortened(first_line(error))})",
                    f"mend it; the row has {name_columns(record)}",
                ) from None
        return made


def _check_format(mapping: Mapping[str, str], kind: RowKind) -> None:
    formats = FORMATS[kind].values()
    allowed = {key for each in formats for key in (*each.required, *each.optional)}
    for key in mapping:
        if key not in allowed:
            raise UserError(
                f"columns: found {key!r} as a column of a format; allowed: {', '.join(sorted(allowed))}."
                f"{did_you_mean(key, allowed)}"
            )
    for each in formats:
        if set(each.required) <= mapping.keys() <= {*each.required, *each.optional}:
            return
    forms = "; ".join(
        " and ".join(each.required) + (f", with or without {', '.join(each.optional)}" if each.optional else "")
        for each in formats
    )
    raise UserError(f"columns: found {', '.join(mapping) or 'none'}; give those of one format: {forms}.")


def _is_template(value: str) -> bool:
    return "{{" in value or "{%" in value


def _as_text(value: Any) -> Any:
    """A value of a column that the user named: a number, true and false as JSON writes them, others as they are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isnan(value):
        return None
    return str(value) if isinstance(value, (int, float)) else value


def _printed(value: Any) -> Any:
    """What a template prints of a value; a null would be printed as the word None."""
    if value is None:
        raise NoRowError("columns: a template prints a null", "say what stands in its place, such as {{ name or '' }}")
    return _as_text(value)
