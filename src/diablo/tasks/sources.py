"""Where a task's records come from: a local folder, or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diablo.data.faults import RowFault
from diablo.data.rows import describe_value, is_unicode, read_records_of
from diablo.errors import UserError

Split = Literal["train", "test"]

LLM_ADAPTERS = "https://github.com/AGI-Edgerunners/LLM-Adapters"

_HOW_TO_GIVE_A_FOLDER = "as data.folder in a recipe or --data-folder on the command line"


@dataclass(frozen=True)
class Source:
    """Where a task's records are.

    Attributes:
        family: a subfolder that a local file may lie in, such as ``math``.
        files: the local file of each split.
        fields: the keys that a record must have, and their types.
        origin: where the files are published, for people to read.
        hub: id of the dataset on the hub, with records of the same fields and splits of the same names; None where no
            reliable one is known.
        config: the hub dataset's configuration.
    """

    family: str
    files: Mapping[Split, str]
    fields: Mapping[str, type | tuple[type, ...]]
    origin: str
    hub: str | None = None
    config: str | None = None


def read_records(source: Source, split: Split, folder: Path | None) -> list[tuple[int, dict[str, Any]]]:
    """The records of a split, each with its number from 1 (in a ``.jsonl`` file, its line).

    Args:
        source: where they are.
        split: which of them.
        folder: a local folder, which is searched for the file itself and for ``FAMILY/FILE``; None asks the hub.

    Raises:
        UserError: the folder lacks the file, the hub does not give the dataset, or a record is malformed.
    """
    if folder is not None:
        path = _find(source, split, folder)
        return _checked(source, str(path), read_records_of(path))
    where = f"{source.hub} ({split})"
    return _checked(source, where, _from_hub(source, split))


def malformed(task: str, split: Split, number: int, reason: str) -> UserError:
    """The error of a record whose values mean nothing to its task."""
    return UserError(f"task {task}: record {number} of the {split} split is malformed: {reason}.")


def _find(source: Source, split: Split, folder: Path) -> Path:
    name = source.files[split]
    candidates = [folder / name, folder / source.family / name]
    for path in candidates:
        if path.is_file():
            return path
    missing = "" if folder.is_dir() else f" (there is no folder {str(folder)!r})"
    raise UserError(
        f"data.folder (--data-folder): found neither {candidates[0]} nor {candidates[1]}{missing}; "
        f"{name} is published at {source.origin}."
    )


def _from_hub(source: Source, split: Split) -> list[tuple[int, Any]]:
    name = source.files[split]
    if source.hub is None:
        raise UserError(
            f"The data {name!r} is on no hub that diablo knows; get it from {source.origin} and give its folder "
            f"{_HOW_TO_GIVE_A_FOLDER}."
        )
    try:
        from datasets import load_dataset

        records = load_dataset(source.hub, source.config, split=split)
    except Exception as error:  # what a hub, a proxy or a cache can raise is open-ended
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"The dataset {source.hub!r} cannot be read from the hub ({reason}); check the network, or give a local "
            f"folder with {name} or {source.family}/{name} {_HOW_TO_GIVE_A_FOLDER}."
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
