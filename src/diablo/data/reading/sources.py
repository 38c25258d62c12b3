"""Sources of rows: files, folders of files and datasets on the hub, each with the columns that are meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diablo.data.faults import NoRowError, RowFault, explain_faults
from diablo.data.reading.columns import Columns
from diablo.data.reading.files import files_of, read_records_of
from diablo.data.reading.formats import to_row
from diablo.data.reading.hub import HubDataset, read_hub
from diablo.data.reading.images import with_images
from diablo.data.rows import Row, RowKind
from diablo.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        place: a file, a folder of files, or a dataset on the hub.
        columns: see :class:`diablo.data.reading.columns.Columns`; None where the columns are those of a format.
        weight: how often each of its rows is trained on in an epoch.
        limit: only so many of its rows, the first; all where None.
    """

    place: Path | HubDataset
    columns: Mapping[str, str] | None = None
    weight: float = 1.0
    limit: int | None = None


@dataclass(frozen=True)
class SourceRows:
    """What a source has.

    Attributes:
        source: the source.
        rows: its rows.
        faults: what is malformed and was left out.
        formats: the names of the formats of its rows, with how many have each.
    """

    source: Source
    rows: list[Row] = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """Where it is, its format and its rows, in a line."""
        source = self.source
        weight = "" if source.weight == 1 else f", weight {source.weight:g}"
        count = f"{len(self.rows):,} row{'s' * (len(self.rows) != 1)}"
        return f"{source.place}: {' and '.join(self.formats)}, {count}{weight}"

    def record(self) -> dict[str, Any]:
        """The same as values of JSON."""
        place = self.source.place
        where = {"path": str(place)} if isinstance(place, Path) else {"hub": place.id, **_asked(place)}
        return {**where, "format": dict(self.formats), "rows": len(self.rows), "weight": self.source.weight}


def _asked(dataset: HubDataset) -> dict[str, Any]:
    return {"name": dataset.name, "split": dataset.split, "revision": dataset.revision}


def read_rows(path: Path, *, on_malformed: str = "error") -> tuple[list[Row], list[RowFault]]:
    """Read a dataset file.

    Args:
        path: a file whose name has one of :data:`diablo.data.reading.files.ENDINGS`.
        on_malformed: ``"error"`` refuses the file where a row is malformed; ``"skip"`` leaves such rows out.

    Returns:
        The rows, and what was left out.

    Raises:
        UserError: the file cannot be read, has no usable row, or has malformed rows; each reason is said once, with the
            numbers of its rows.
    """
    [found] = read_sources([Source(path)], on_malformed=on_malformed)
    return found.rows, found.faults


def read_sources(
    sources: Sequence[Source], *, kind: RowKind = "completions", on_malformed: str = "error"
) -> list[SourceRows]:
    """Read sources. Where they are several files, each row and fault names its own.

    Args:
        sources: the sources.
        kind: what kind of rows they are to have.
        on_malformed: as in :func:`read_rows`.

    Raises:
        UserError: as in :func:`read_rows`, with one line for each file that has malformed rows.
    """
    places = [files_of(source.place) if isinstance(source.place, Path) else [source.place] for source in sources]
    names = _names(place for several in places for place in several)
    result, lines = [], []
    for source, several in zip(sources, places, strict=True):
        found = SourceRows(source)
        for place in several:
            left = None if source.limit is None else source.limit - len(found.rows)
            count, faults = _read_into(found, place, names[place], kind, left)
            if faults and on_malformed == "error":
                why = explain_faults([replace(fault, source="") for fault in faults])
                mend = "." if len(faults) == count else ", or set data.on_malformed=skip to leave them out."
                lines.append(f"{place} has {len(faults)} malformed of {count} rows. {why} Mend them{mend}")
        if not found.rows and not (found.faults and on_malformed == "error"):
            why = f" {explain_faults(found.faults)}" if found.faults else ""
            raise UserError(
                f"{source.place} has no usable row (of {len(found.faults)}); there is nothing to train on.{why}"
            )
        result.append(found)
    if lines:
        raise UserError("\n".join(lines))
    return result


def _read_into(
    found: SourceRows, place: Path | HubDataset, name: str, kind: RowKind, most: int | None
) -> tuple[int, list[RowFault]]:
    """Add the rows of a file or a dataset to those of a source: how many records were read, and those with a fault."""
    records = read_records_of(place) if isinstance(place, Path) else read_hub(place)
    columns = Columns(found.source.columns, kind) if found.source.columns else None
    count, before, faults = 0, len(found.rows), list[RowFault]()
    for number, record in records:
        if most is not None and len(found.rows) - before >= most:
            break
        count += 1
        if isinstance(record, RowFault):
            faults.append(replace(record, source=name))
            continue
        try:
            chosen = record if columns is None else columns(record)
            if kind == "prompts" and isinstance(record, dict) and isinstance(chosen, dict):
                # Rewards are told of all that the record has.
                chosen = record | chosen
            row, form = to_row(number, chosen, kind)
            row = with_images(row, place.parent if isinstance(place, Path) else None, kind)
        except NoRowError as error:
            faults.append(replace(error.at(number), source=name))
        else:
            found.rows.append(replace(row, source=name) if name else row)
            found.formats[form] += 1
    found.faults.extend(faults)
    return count, faults


def _names(places: Iterable[Path | HubDataset]) -> dict[Path | HubDataset, str]:
    """What messages call each place: the file by its name where no other has it; nothing where there is one place."""
    distinct = list(dict.fromkeys(places))
    if len(distinct) == 1:
        return {distinct[0]: ""}
    short = Counter(place.name for place in distinct if isinstance(place, Path))
    return {
        place: place.name if isinstance(place, Path) and short[place.name] == 1 else str(place) for place in distinct
    }
