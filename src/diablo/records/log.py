"""The log of a run: what the console says, and what happens beside it, as lines with times in a file."""

from __future__ import annotations

import logging
import os
import re
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import transformers
from rich.console import Console

from diablo.errors import Interrupted, UserError

LOGGER = logging.getLogger("diablo")
_SECRET_NAMES = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_SHORTEST_SECRET = 8


def say(console: Console, text: str) -> None:
    """Write a line to the console, and to the log of the run where there is one."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    LOGGER.info(text)


class RunLog(logging.Handler):
    """Writes the log of a run to a file, from :meth:`open` on and with what was said before.

    As a context it listens to :data:`LOGGER` and to the warnings and log lines of libraries that are shown on the
    console. An exception that ends the context is logged and goes on: one that nobody expects has its traceback. Values
    of environment variables that are secrets by their names, and credentials in URLs, are left out.

    Args:
        console: where it is said that the file cannot be written, which is no reason to end a run.
        enabled: whether this process writes a log.
    """

    def __init__(self, console: Console, *, enabled: bool) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.console, self.enabled = console, enabled
        self._file: TextIO | None = None
        self._waiting: list[str] | None = []
        self._secrets = [
            value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET
        ]

    def open(self, path: Path, *, append: bool) -> None:
        """Begin the file, or go on with it."""
        if not self.enabled:
            return
        waiting, self._waiting = self._waiting or [], None
        try:
            self._file = path.open("a" if append else "w", encoding="utf-8", errors="backslashreplace")
            self._write("".join(waiting))
        except OSError as error:
            self._give_up(error)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        text = _SECRET_IN_URL.sub("***", self.format(record))
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if self._waiting is not None:
            self._waiting.append(text + "\n")
            return
        try:
            self._write(text + "\n")
        except OSError as error:
            self._give_up(error)

    def _write(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()

    def _give_up(self, error: OSError) -> None:
        self._file = None
        self.console.print(f"The log cannot be written ({error.strerror}); it ends here.", markup=False)

    def __enter__(self) -> RunLog:
        if self.enabled:
            self._level, self._shown, self._last = LOGGER.level, warnings.showwarning, logging.lastResort
            LOGGER.setLevel(logging.INFO)
            LOGGER.addHandler(self)
            transformers.logging.add_handler(self)
            warnings.showwarning = self._show_warning
            logging.lastResort = _Both(self._last, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.enabled:
            return
        if isinstance(error, UserError):
            LOGGER.error("error: %s", error)
        elif isinstance(error, Interrupted):
            LOGGER.info(str(error))
        elif isinstance(error, Exception):
            LOGGER.error("".join(traceback.format_exception(error)).rstrip())
        elif error is not None:
            LOGGER.error("ended at once by %s", type(error).__name__)
        warnings.showwarning, logging.lastResort = self._shown, self._last
        transformers.logging.remove_handler(self)
        LOGGER.removeHandler(self)
        LOGGER.setLevel(self._level)
        if self._file is not None:
            self._file.close()

    def _show_warning(self, message: Warning | str, category: type[Warning], *where: Any, **rest: Any) -> None:
        self._shown(message, category, *where, **rest)
        LOGGER.warning("%s: %s", category.__name__, message)


class _Both(logging.Handler):
    """What loggers without a handler write to: standard error, as ever, and the log."""

    def __init__(self, shown: logging.Handler | None, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._shown, self._log = shown, log

    def emit(self, record: logging.LogRecord) -> None:
        if self._shown is not None:
            self._shown.handle(record)
        self._log.handle(record)
