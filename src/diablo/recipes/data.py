"""The section ``data`` of a recipe: what is trained on, what is held out, and how rows are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from diablo.data.reading.columns import Columns
from diablo.data.reading.files import files_of
from diablo.data.reading.hub import HubDataset
from diablo.data.reading.sources import Source
from diablo.data.rows import RowKind
from diablo.data.special_text import SpecialTextMode
from diablo.errors import UserError, shortened
from diablo.recipes.section import Section, explained

_SOURCES = "a file, a folder of files, a section with path or hub, or a list of these"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


class DataSource(Section):
    """One of the sources of rows: a file, a folder of files, or a dataset on the hub."""

    path: Path | None = Field(None, description="a file or a folder of files")
    hub: str | None = Field(None, min_length=1, description="the id of a dataset on the hub")
    name: str | None = Field(None, description="the name of the dataset's configuration")
    split: str | None = Field(None, description="the name of a split of the dataset")
    revision: str | None = Field(None, description="a branch, a tag or a commit of the dataset, in quotes")
    streaming: bool = Field(False, description="true or false: download no more than the first data rows")
    columns: dict[str, str] | None = Field(
        None, description="a column's name or a Jinja template for each column of a format"
    )
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="a number above 0: how often each row is trained on in an epoch"
    )
    limit: int | None = Field(None, ge=1, description="an integer of at least 1: only so many rows of this source")

    @model_serializer(mode="wrap")
    def _in_short(self, handler: SerializerFunctionWrapHandler) -> Any:
        """As people write it: recipes of runs are read by them."""
        fields = type(self).model_fields
        given = {key: value for key, value in handler(self).items() if value != fields[key].default}
        return given["path"] if given.keys() == {"path"} else given

    def resolved(self, columns: dict[str, str] | None) -> Source:
        """The source, with the columns that are meant for all sources where it has none of its own."""
        place: Path | HubDataset | None = self.path
        if place is None:
            assert self.hub is not None  # the section sees to it
            place = HubDataset(self.hub, self.split or "train", self.name, self.revision, self.streaming)
        return Source(place, self.columns or columns, self.weight, self.limit)


@explained()
def _as_sources(value: Any, info: ValidationInfo) -> Any:
    """Paths and sections, or a list of them, as sections."""
    if value is None:
        return None
    several = list(value) if isinstance(value, (list, tuple)) else [value]
    sections = [{"path": each} if isinstance(each, (str, Path)) else each for each in several]
    if not several or not all(isinstance(each, (dict, DataSource)) for each in sections):
        raise UserError(f"data.{info.field_name}: found {shortened(value)}; allowed: {_SOURCES}.")
    return sections


@explained()
def _as_held_out(value: Any, info: ValidationInfo) -> Any:
    """A number or a share of the training rows as it is, and sources as :func:`_as_sources` has them."""
    if isinstance(value, (bool, float)) or (isinstance(value, int) and value < 1):
        raise UserError(
            f"data.eval: found {value!r}; allowed: rows as an integer of at least 1, a share such as 5%, or {_SOURCES}."
        )
    if isinstance(value, int):
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        share = _SHARE.fullmatch(value.strip())
        if share is None or not 0 < float(share[1]) < 100:
            raise UserError(f"data.eval: found {value!r}; a share is above 0% and below 100%, such as 5%.")
        return value.strip()
    return _as_sources(value, info)


def _kind_of_held_out(value: Any) -> str:
    return "rows" if isinstance(value, int) else "share" if isinstance(value, str) else "sources"


OneSource = str | DataSource
Sources = Annotated[
    tuple[DataSource, ...], BeforeValidator(_as_sources, json_schema_input_type=OneSource | list[OneSource])
]
HeldOut = Annotated[
    Annotated[int, Tag("rows")] | Annotated[str, Tag("share")] | Annotated[tuple[DataSource, ...], Tag("sources")],
    Discriminator(_kind_of_held_out),
    BeforeValidator(_as_held_out, json_schema_input_type=int | OneSource | list[OneSource]),
]


class Data(Section):
    """The user's own data or folder of the tasks' datasets, and how rows are read."""

    train: Sources | None = Field(None, description=f"{_SOURCES}: the rows to train on")
    eval: HeldOut | None = Field(
        None,
        description="the held-out rows, whose loss is measured: a number of rows of data.train, or a share such as "
        f"5%, or {_SOURCES}",
    )
    columns: dict[str, str] | None = Field(
        None, description="a column's name or a Jinja template for each column of a format, for all sources"
    )
    folder: Path | None = Field(None, description="a folder of the tasks' datasets, read in place of the hub")
    on_malformed: Literal["error", "skip"] = Field(
        "error", description="error or skip: what is done about malformed rows"
    )
    on_long: Literal["error", "drop", "truncate"] = Field(
        "drop",
        description="error, drop or, where texts or words are labelled or compared, truncate: what is done about rows "
        "over training.max_length; with objective embedding truncate if not given",
    )
    special_text: SpecialTextMode = Field(
        "keep", description="keep or plain: whether text that spells a special token becomes that token or stays text"
    )
    limit: int | None = Field(None, ge=1, description="an integer of at least 1: only so many training rows")
    validation_rows: int | None = Field(
        None, ge=1, description="an integer of at least 1: so many of the training rows are kept out of training"
    )
    validation_seed: int = Field(
        0, ge=0, description="an integer of at least 0: chooses the rows that are cut out of the training rows"
    )
    held_out: Literal["test", "validation"] = Field(
        "test", description="test or validation: the rows on which the held-out loss is measured"
    )

    @property
    def eval_sources(self) -> tuple[DataSource, ...]:
        """The sources of held-out rows; none where they are cut out of the training rows."""
        return self.eval if isinstance(self.eval, tuple) else ()

    def held_out_rows(self, rows: int) -> int:
        """How many of so many training rows are cut out as held-out rows."""
        if isinstance(self.eval, str):
            return max(1, round(float(self.eval.removesuffix("%")) / 100 * rows))
        return self.eval if isinstance(self.eval, int) else 0

    @model_validator(mode="after")
    @explained()
    def _check_sources(self) -> Data:
        for key, sources in (("data.train", self.train or ()), ("data.eval", self.eval_sources)):
            for source in sources:
                _check_source(key, source)
        if self.eval_sources and any(source.weight != 1 for source in self.eval_sources):
            raise UserError(
                "data.eval: found weight, which is for data.train: every held-out row counts once; leave it out."
            )
        if self.eval is not None and self.train is None and not self.eval_sources:
            raise UserError(
                f"data.eval: found {self.eval}, which is cut out of data.train, and there is none. Of a task's rows, "
                "data.validation_rows with data.held_out=validation are held out."
            )
        return self

    def check(self, kind: RowKind) -> None:
        """Check that the files and folders are there, and that columns are those of the rows that are needed.

        Args:
            kind: the kind of the rows.

        Raises:
            UserError: they are not, or are no datasets.
        """
        _check_columns("data", self.columns, kind)
        for key, sources in (("data.train", self.train or ()), ("data.eval", self.eval_sources)):
            for source in sources:
                _check_columns(key, source.columns, kind)
                try:
                    if source.path is not None:
                        files_of(source.path)
                except UserError as error:
                    raise UserError(f"{key}: {error}") from None


def _check_source(key: str, source: DataSource) -> None:
    if (source.path is None) == (source.hub is None):
        what = "both path and hub" if source.path else "neither path nor hub"
        raise UserError(f"{key}: found {what}; give path (a file or a folder) or hub (the id of a dataset).")
    options = ("name", "split", "revision", "streaming")
    if source.path is not None and (given := [option for option in options if getattr(source, option)]):
        raise UserError(
            f"{key}: found {', '.join(given)} beside path {str(source.path)!r}; {given[0]} is for hub: leave it out."
        )
    if source.streaming and source.limit is None:
        raise UserError(f"{key}: found streaming: true, which takes the first rows; say how many with limit.")
    if source.hub is not None and source.split is None and key == "data.eval":
        raise UserError(
            f"{key}: found hub {source.hub!r} without split; say which rows are held out, such as split: test."
        )


def _check_columns(key: str, columns: dict[str, str] | None, kind: RowKind) -> None:
    if columns is None:
        return
    try:
        Columns(columns, kind)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
