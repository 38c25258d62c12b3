"""Sets in the format of LLM-Adapters (Hu et al., EMNLP 2023): an instruction, its output, and the output's answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from diablo.data.rows import instruction_row
from diablo.tasks.base import Problem, RecordTask
from diablo.tasks.sources import Source, Split

_FIELDS: dict[str, type | tuple[type, ...]] = {"instruction": str, "output": str, "answer": (str, int, float)}


def adapters_source(*places: str, hub: str | None = None) -> Source:
    """A source of records in the format of LLM-Adapters."""
    return Source(places=places, fields=_FIELDS, origin="https://github.com/AGI-Edgerunners/LLM-Adapters", hub=hub)


class AdaptersTask(RecordTask):
    """A set in the format of LLM-Adapters. Each subclass gives what differs from set to set.

    Args:
        name: the task's name; None for a class that is not itself a task.
        sizes: the splits that there are, and how many records each has.
        words: a regular expression of the answers; that of the base class if None.
        published: the set's name in LLM-Adapters' ``dataset`` folder; the task's name if None.
        source: where the records are; None if the set is in that folder.
    """

    family: ClassVar[str]
    """The subfolder of the local files."""
    words: ClassVar[str] = ""
    licence = "Apache-2.0, as LLM-Adapters publishes it; the set that it is made from keeps its own"

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        sizes: Mapping[Split, int] | None = None,
        words: str | None = None,
        published: str | None = None,
        source: Source | None = None,
    ) -> None:
        super().__init_subclass__()
        if words is not None:
            cls.words = words
        if name is None or sizes is None:
            return
        file = published or name
        cls.name, cls.splits, cls.sizes = name, tuple(sizes), tuple(sizes.values())
        cls.source = source or adapters_source(
            f"{cls.family}/{file}.{{split}}.json", f"LLM-Adapters/dataset/{file}/{{split}}.json"
        )

    def problem(self, number: int, record: dict[str, Any]) -> Problem | str:
        """The instruction, and the output as its response."""
        answer = self.read_answer(record["answer"])
        if answer is None:
            return f"answer is {record['answer']!r}, not {self.allowed}"
        return Problem(instruction_row(number, record["instruction"].strip(), record["output"].strip()), answer)

    @property
    def allowed(self) -> str:
        """In words for a message, what an answer of a record has to be."""
        return f"one of {self.words}"

    def read_answer(self, answer: str | float) -> str | None:
        """The answer that a record names; None if it is not an answer of this task."""
        return answer if isinstance(answer, str) and re.fullmatch(self.words, answer) else None
