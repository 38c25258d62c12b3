"""Progress on the console: a bar on a terminal, and now and then a line where the output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

_SECONDS_BETWEEN_LINES = 15.0


class ProgressReport:
    """A progress bar for a piece of work of known length.

    Args:
        console: where to write.
        description: what is being done.
        total: number of items.
    """

    def __init__(self, console: Console, description: str, total: int) -> None:
        self.console = console
        self.description = description
        self.total = total
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, figures="")

    def update(self, done: int, figures: str = "") -> None:
        """Show how many items are done, with some figures beside the bar."""
        self._bar.update(self._task, completed=done, figures=figures)
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or done == self.total
        if not self.console.is_terminal and is_due and done:
            left = (now - self._started) / done * (self.total - done)
            line = f"{self.description} {done}/{self.total}  {figures}  {left:.0f} s left"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._last_line = now

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()


class TrainingProgress(TrainerCallback):
    """The training bar: steps, the loss or the reward of completions, tokens per second and time left.

    Args:
        console: where to write.
        meter: counts the tokens of the batches.
    """

    def __init__(self, console: Console, meter: TokenMeter) -> None:
        self.console = console
        self.meter = meter
        self._report: ProgressReport | None = None
        self._figures = ""
        self._measure, self._value = "loss", 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self._report = ProgressReport(self.console, "training", state.max_steps)
        self._report.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the figures of the log, for the bar."""
        if logs and "loss" in logs:
            # Where completions are written for several steps, only the first of these has a reward to log.
            self._measure = "reward" if "reward" in logs else self._measure
            if self._measure in logs:
                self._value = float(logs[self._measure])
            self._figures = f"{self._measure} {self._value:.3f}  {self.meter.tokens_per_second():.0f} tokens/s"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._report is not None:
            self._report.update(state.global_step, self._figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, also where training ended early."""
        if self._report is not None:
            self._report.__exit__(None, None, None)
            self._report = None


class TokenMeter:
    """Counts tokens and padding as batches are made. This is on the host, so that nothing waits for a device."""

    def __init__(self) -> None:
        self.tokens = 0
        self.padded = 0
        self.paused_seconds = 0.0
        self._started: float | None = None
        self._paused: float | None = None

    def count(self, tokens: int, padded: int) -> None:
        """Add a batch.

        Args:
            tokens: number of its tokens without padding.
            padded: number of its tokens with padding.
        """
        if self._started is None:
            self._started = time.perf_counter() - self.paused_seconds
        self.tokens += tokens
        self.padded += padded

    @property
    def padding_share(self) -> float:
        """The share of padding among all counted tokens, from 0 to 1."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    def seconds(self) -> float:
        """Time since the first batch, without pauses."""
        if self._started is None:
            return 0.0
        now = time.perf_counter() if self._paused is None else self._paused
        return now - self._started - self.paused_seconds

    def tokens_per_second(self) -> float:
        """Tokens per second, without padding."""
        seconds = self.seconds()
        return self.tokens / seconds if seconds else 0.0

    @contextmanager
    def pause(self) -> Generator[None]:
        """Leave out the time that passes inside this context, or inside a function that it decorates.

        Evaluations are left out in this way.
        """
        start = self._paused = time.perf_counter()
        yield
        self._paused = None
        self.paused_seconds += time.perf_counter() - start
