"""Rows of figures, each measured by itself. A row that fails or comes too late is recorded, and the next follows."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BROKEN = 3
"""Exit code of a process whose GPU no longer answers. Another process goes on after the row that broke it."""


class NotThereError(Exception):
    """Something that a row needs does not exist here. The message says what and why."""


class Recorder:
    """Measures rows and appends each to a file at once, so that a process that dies loses only its last row.

    Args:
        path: a file with one JSON object in each line.
        deadline: the time after which no row is begun, in seconds since the epoch.
        done: names of the rows that are measured already, from :func:`row_name`.
        device: where the rows are measured.
    """

    def __init__(self, path: Path, deadline: float, done: set[str], device: torch.device) -> None:
        self.path, self.deadline, self.done, self.device = path, deadline, done, device
        self.part = ""

    def run_part(self, part: str, measure: Callable[[], None]) -> None:
        """Measure the rows of a part. An error outside of a row is recorded as the part's error."""
        self.part = part
        start = time.time()
        line: dict[str, Any] = {"part": part, "event": "part"}
        try:
            measure()
        except Exception as error:
            line["error"] = describe(error)
        self._clean_up("error" in line)
        self.write({**line, "took": round(time.time() - start, 1)})

    def row(self, measure: Callable[[], dict[str, Any]], **keys: Any) -> None:
        """Measure one row.

        Args:
            measure: measures and returns the figures.
            keys: what the row is about, such as sizes and method. No two rows of a part have the same keys.
        """
        if row_name(self.part, keys) in self.done:
            return
        start = time.time()
        if start > self.deadline:
            self.write({"part": self.part, "event": "row", "keys": keys, "left_out": "the time was up"})
            return
        self.write({"part": self.part, "event": "start", "keys": keys})
        figures: dict[str, Any]
        try:
            figures = measure()
        except NotThereError as error:
            figures = {"note": str(error)}
        except Exception as error:
            figures = {"error": describe(error)}
        took = round(time.time() - start, 1)
        self.write({"part": self.part, "event": "row", "keys": keys, **figures, "took": took})
        outcome = figures.get("error") or figures.get("note") or ""
        print(
            f"{took:6.1f} s  {self.part}: {', '.join(map(str, keys.values()))} {outcome}", file=sys.stderr, flush=True
        )
        self._clean_up("error" in figures)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _clean_up(self, is_suspect: bool) -> None:
        """Free memory before the next row, and end this process where an error has broken the GPU."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
            if is_suspect:
                torch.ones(8, device=self.device).sum().item()
        except RuntimeError:
            sys.exit(BROKEN)


def row_name(part: str, keys: dict[str, Any]) -> str:
    """A name of a row that no other row has."""
    return json.dumps([part, keys])


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
