"""What wandb has written to its files for a run offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _RECORD = 7, 32 * 1024, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: the format is that of LevelDB's log, behind a header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), _HEADER, b""
    while position + _RECORD <= len(content):
        if _BLOCK - position % _BLOCK < _RECORD:
            position += _BLOCK - position % _BLOCK
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + _RECORD : position + _RECORD + length]
        position += _RECORD + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_run(path: Path) -> dict[str, Any]:
    """A run's ``id``, ``project``, ``name``, ``tags``, ``config``, ``history`` and ``exit`` status."""
    run: dict[str, Any] = {"config": {}, "history": [], "exit": None}
    for record in _records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
            run["tags"] = list(record.run.tags)
            run["config"] |= _items(record.run.config.update)
        elif kind == "config":
            run["config"] |= _items(record.config.update)
        elif kind == "history":
            run["history"].append(_items(record.history.item))
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run
