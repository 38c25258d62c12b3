"""Where a task's records come from: a local folder, or the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from diablo.data.faults import RowFault
from diablo.data.reading.files import read_records_of
from diablo.data.rows import describe_value, is_unicode
from diablo.errors import UserError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_HOW_TO_GIVE_A_FOLDER = "as data.folder in a recipe or --data-folder on the command line"
_PART = re.compile(r"(.*)-(\d+)-of-(\d+)")


@dataclass(frozen=True)
class Source:
    """Where a task's records are.

    Attributes:
        places: where a split lies in a folder of datasets. Each is a path in which ``{split}`` stands for the split's
            name and ``*`` for anything. The first is diablo's own. The others are paths of the published data. They
            begin with the folder that a clone of the repository, or a copy from the hub, makes.
        fields: the keys that a record must have, and their types.
        origin: where the data is published, for people to read.
        hub: id of the dataset on the hub, with the same fields and the same names of splits; None if no reliable one is
            known.
        config: the hub dataset's configuration.
    """

    places: tuple[str, ...]
    fields: Mapping[str, type | tuple[type, ...]]
    origin: str
    hub: str | None = None
    config: str | None = None

    def own_place(self, split: Split) -> str:
        """diablo's own path of a split."""
        return self.places[0].format(split=split)

    def paths(self, split: str) -> list[str]:
        """The paths at which a split is looked for below a folder of datasets. The first that is there is read.

        The folder of datasets may be any of the folders in a place. A path is therefore looked for from each of its
        parts on. A published path keeps at least two parts, and the first of them is a name, since many datasets have a
        ``test.json`` or match ``*/*.json``.
        """
        own, *published = (place.format(split=split) for place in self.places)
        ends = [end for place in published for end in _ends(place, 2) if not end.startswith("*")]
        return list(dict.fromkeys([*_ends(own, 1), *ends]))


def _ends(path: str, fewest: int) -> list[str]:
    """The ends of a path that have at least ``fewest`` parts, the shortest first."""
    parts = path.split("/")
    return ["/".join(parts[-count:]) for count in range(fewest, len(parts) + 1)]


def read_records(source: Source, split: Split, folder: Path | None) -> list[tuple[int, dict[str, Any]]]:
    """The records of a split, each with its number from 1 (in a ``.jsonl`` file, its line).

    Args:
        source: where they are.
        split: which of them.
        folder: a local folder, in which the split's :meth:`Source.paths` are looked for; None asks the hub.

    Raises:
        UserError: the folder lacks the split, the hub does not give the dataset, or a record is malformed.
    """
    if folder is None:
        return _checked(source, f"{source.hub} ({split})", _from_hub(source, split))
    pattern, files = find_files(source, split, folder)
    # If each record is a file of its own, that file holds an object and not a list.
    is_one = "*" in pattern and pattern.endswith(".json")
    parts = [_checked(source, str(path), [(1, read_json(path))] if is_one else read_records_of(path)) for path in files]
    if len(parts) == 1:
        return parts[0]
    return list(enumerate((record for part in parts for _, record in part), start=1))


def find_files(source: Source, split: Split, folder: Path) -> tuple[str, list[Path]]:
    """The path at which a folder of datasets has a split, and its files there. A ``*`` can match several.

    Raises:
        UserError: there are none, or some parts of the split are missing.
    """
    if not folder.is_dir():
        raise UserError(f"data.folder (--data-folder): there is no folder {str(folder)!r}.")
    paths = source.paths(split)
    for pattern in paths:
        if files := files_at(folder, pattern):
            _check_parts(files)
            return pattern, files
    raise UserError(
        f"data.folder (--data-folder): {str(folder)!r} has none of {', '.join(paths)}; get the data from "
        f"{source.origin} and put it there as {source.own_place(split)}, or as it is published."
    )


def files_at(folder: Path, pattern: str) -> list[Path]:
    """The files below a folder at a path with wildcards, sorted by folder, and by the numbers in their names."""
    found = (path for path in folder.glob(pattern) if path.is_file())
    return sorted(found, key=lambda path: (path.parent, len(path.name), path.name))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None


def _check_parts(files: list[Path]) -> None:
    """Check that files with names such as ``test-00000-of-00002`` are all the parts of one whole."""
    parts = [(found[1], int(found[2]), int(found[3])) for path in files if (found := _PART.fullmatch(path.stem))]
    if parts and parts != [(parts[0][0], number, len(parts)) for number in range(len(parts))]:
        raise UserError(
            f"data.folder (--data-folder): found {', '.join(path.name for path in files)} in {str(files[0].parent)!r}, "
            "which are not all the parts of one dataset, each once; get it anew."
        )


def _from_hub(source: Source, split: Split) -> list[tuple[int, Any]]:
    name = source.own_place(split)
    if source.hub is None:
        raise UserError(
            f"The data {name!r} is on no hub that diablo knows; get it from {source.origin}, put it into a folder by "
            f"this name or as it is published, and give the folder {_HOW_TO_GIVE_A_FOLDER}."
        )
    try:
        from datasets import load_dataset

        records = load_dataset(source.hub, source.config, split=split)
    except Exception as error:  # what a hub, a proxy or a cache can raise is open-ended
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"The dataset {source.hub!r} cannot be read from the hub ({reason}); check the network, or give a local "
            f"folder with {name}, or with the data as it is published, {_HOW_TO_GIVE_A_FOLDER}."
        ) from None
    return list(enumerate(records, start=1))


def _checked(source: Source, where: str, records: list[tuple[int, Any]]) -> list[tuple[int, dict[str, Any]]]:
    if not records:
        raise UserError(f"{where} has no records.")
    for number, record in records:
        fault = _fault(source, record)
        if fault is not None:
            raise UserError(f"{where}: record {number} is malformed: {fault}.")
    return records


def _fault(source: Source, record: Any) -> str | None:
    if isinstance(record, RowFault):
        return record.reason
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__}, not an object"
    for key, kinds in source.fields.items():
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(record.get(key), allowed):
            names = " or ".join(kind.__name__ for kind in allowed)
            return f"{key} is {describe_value(record, key)}, not a {names}"
        if isinstance(record[key], str) and not is_unicode(record[key]):
            return f"{key} is not valid Unicode"
    return None
