"""The server's log: a JSON object a line, without prompts and without answers."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("diablo.web")


def note(event: str, level: int = logging.INFO, **facts: Any) -> None:
    """Write a line.

    Args:
        event: what has happened, in a word.
        level: how grave it is, as :mod:`logging` counts.
        facts: what else is to be known; values of JSON.
    """
    LOGGER.log(level, event, extra={"facts": facts})


class _Lines(logging.Formatter):
    """Log records as lines of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, of this package or of another one."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "facts", {"logger": record.name})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_standard_error() -> None:
    """Write the server's log, and what uvicorn has to say, to standard error."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, level in ((LOGGER.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
