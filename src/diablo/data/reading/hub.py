"""Records of datasets on the hub, or of a folder as the library datasets reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diablo.data.reading.files import without_nulls
from diablo.errors import UserError, first_line


def _undecoded(feature: Any) -> Any:
    """Features of a dataset in which images stay the bytes or the path that they are stored as."""
    from datasets import Features, Image, LargeList, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        inner = {key: _undecoded(value) for key, value in feature.items()}
        return Features(inner) if isinstance(feature, Features) else inner
    return feature


@dataclass(frozen=True)
class HubDataset:
    """A split of a dataset on the hub.

    Attributes:
        id: the dataset's id.
        name: its configuration; its only one, or its default, where None.
        split: the split.
        revision: a branch, a tag or a commit; the latest where None.
        streaming: read rows one by one as they are asked for, and download no more.
    """

    id: str
    split: str
    name: str | None = None
    revision: str | None = None
    streaming: bool = False

    def __str__(self) -> str:
        parts = (self.id, self.name, self.split, self.revision and f"revision {self.revision}")
        return ", ".join(part for part in parts if part)


def read_hub(dataset: HubDataset) -> Iterator[tuple[int, Any]]:
    """The records of a dataset, each with its number from 1.

    Raises:
        UserError: the hub does not answer, or has no such dataset or split.
    """
    try:
        from datasets import load_dataset

        records = load_dataset(
            dataset.id,
            dataset.name,
            split=dataset.split,
            revision=dataset.revision,
            streaming=dataset.streaming,
        )
        # Decoded, all images would be held in memory.
        if records.features is not None and (stored := _undecoded(records.features)) != records.features:
            records = records.cast(stored)
        for number, record in enumerate(records, start=1):
            yield number, without_nulls(record) | dict.fromkeys(key for key in record if record[key] is None)
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"The hub did not answer when asked for the dataset {dataset.id!r} ({first_line(error)}); check the "
            "network, or give files in its place, as a path."
        ) from None
    except Exception as error:  # what a hub, a proxy or a reader of files can raise is open-ended
        raise UserError(
            f"The dataset {dataset} cannot be read ({first_line(error)}); mend hub, name, split or revision, or give "
            "files in its place, as a path."
        ) from None
