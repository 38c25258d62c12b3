"""A group of settings, and the settings that have checks of their own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from diablo.errors import UserError


def _names_or_expression(value: Any) -> Any:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        return value
    raise ValueError("not names")


def _layer_indices(value: Any) -> Any:
    indices = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        return value
    raise ValueError("not indices")


# One check instead of a union of types: a fault is reported at the key, not at each type that the union offers.
ModuleNames = Annotated[Any, BeforeValidator(_names_or_expression, json_schema_input_type=str | list[str] | None)]
LayerIndices = Annotated[Any, BeforeValidator(_layer_indices, json_schema_input_type=int | list[int] | None)]


def _names(value: Any) -> Any:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    raise ValueError("not names")


Names = Annotated[Any, BeforeValidator(_names, json_schema_input_type=str | list[str] | None)]


def _template_text(value: Any) -> Any:
    """The template itself, so that a run keeps what it was trained with, whatever becomes of the file."""
    if not isinstance(value, (str, Path)) or any(mark in str(value) for mark in ("{{", "{%", "{#")):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        raise ValueError("neither Jinja nor a text file") from None


ChatTemplateText = Annotated[str | None, BeforeValidator(_template_text, json_schema_input_type=str | None)]


class Section(BaseModel):
    """A group of settings; a key that it does not have is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


EXPLAINED = "explained"
"""The type of a finding of pydantic's whose message is one for the user, key and all."""


@contextmanager
def explained() -> Generator[None]:
    """Let pydantic report an error for the user in its own words."""
    try:
        yield
    except UserError as error:
        raise PydanticCustomError(EXPLAINED, "{words}", {"words": str(error)}) from None
