"""The thread that owns the model: it decodes rows in turns, and tells each row's client what is written."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, TypeVar

import torch

from diablo.devices import is_out_of_memory
from diablo.errors import UserError, first_line
from diablo.serving.adapters import Adapter, Adapters
from diablo.serving.batch import Ask, Batch, Piece, Row, no_context
from diablo.serving.beside import Beside
from diablo.serving.scheduling import Job, Limits, Scheduler
from diablo.serving.weights import Blocks, Weights

T = TypeVar("T")


class QueueFullError(Exception):
    """So many rows wait that no further one is taken."""


class ClosedError(Exception):
    """The engine takes no further rows, since it is about to end."""


@dataclass(frozen=True)
class Fault:
    """Why a row ends without having been finished.

    Attributes:
        message: the reason, for the client.
        kind: ``"adapter"`` where the adapter cannot be used, ``"closed"`` where the server ends, ``"memory"`` where
            memory ran out, and ``"error"`` for any other error of the model.
    """

    message: str
    kind: str


Sink = Callable[["Piece | Fault"], None]
"""Called by the engine's thread with each piece of a row, the last of which has an end, or with a fault."""


@dataclass
class Counts:
    """What the engine has done since it was made.

    Attributes:
        forwards: forwards of the model, each of one batch.
        prompt_tokens: tokens of prompts that were read.
        written_tokens: tokens that were written.
        rows_forwarded: rows of all forwards together, so that the mean batch is known.
        mixed_forwards: forwards in which blocks stood beside the weights, so that adapters could share a batch.
        mixed_rows: rows of all these together.
        turns: turns of adapters.
        busy: seconds in which there was something to do.
        switching: seconds of these in which adapters were read, placed and written into the weights.
        faults: rows that ended with a fault.
    """

    forwards: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    rows_forwarded: int = 0
    mixed_forwards: int = 0
    mixed_rows: int = 0
    turns: int = 0
    busy: float = 0.0
    switching: float = 0.0
    faults: int = 0


@dataclass(frozen=True)
class _Waiting:
    """A row that the engine has accepted."""

    ask: Ask
    sink: Sink
    adapter: Adapter | None


@dataclass
class _Task:
    """A call that another thread wants to have made here."""

    function: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)


class Engine:
    """A thread that decodes rows for many adapters with one model.

    Args:
        weights: the model's weights.
        adapters: the adapters.
        tokenizer: decodes tokens. No other thread uses it.
        limits: what a turn may take.
        queue: the most rows that wait.
    """

    def __init__(self, weights: Weights, adapters: Adapters, tokenizer: Any, limits: Limits, queue: int = 256) -> None:
        self.weights, self.adapters, self.limits = weights, adapters, limits
        self.queue = queue
        self.counts = Counts()
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(limits, lambda adapter: None if adapter is None else adapter.group)  # pyrefly: ignore[missing-attribute]
        self._changed = Condition()
        self._accepted: dict[int, _Waiting] = {}
        # Adapters of rows that have come, of which is not known yet what they can share a batch with.
        self._new: deque[Adapter] = deque()
        self._batches: list[Batch] = []
        self._beside: Beside | None = None
        # The values of the adapters that share the present turn.
        self._values: dict[Adapter, Blocks] = {}
        self._tasks: deque[_Task] = deque()
        self._numbers = itertools.count()
        self._is_closed = self._is_stopped = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """The number of rows that wait."""
        with self._changed:
            return self._scheduler.waiting

    @property
    def begun(self) -> int:
        """The number of rows under way."""
        with self._changed:
            return self._scheduler.begun

    @property
    def kept_tokens(self) -> int:
        """The tokens that the rows under way may come to need in the cache of keys and values."""
        with self._changed:
            return self._scheduler.tokens

    def submit(self, adapter: Adapter | None, asks: Sequence[tuple[Ask, Sink]]) -> list[int]:
        """Have rows decoded: all of them, or none.

        Args:
            adapter: whose rows they are; None for the base model.
            asks: what each is asked for, and who is told of it.

        Returns:
            A number for each, for :meth:`cancel`.

        Raises:
            QueueFullError: so many would wait that there is no place.
            ClosedError: the engine is about to end.
            ValueError: a row could never begin.
        """
        with self._changed:
            if self._is_closed:
                raise ClosedError("The server is about to end and takes no further requests.")
            if self._scheduler.waiting + len(asks) > self.queue:
                raise QueueFullError(f"{self._scheduler.waiting} of {self.queue} places of the queue are taken.")
            keys = [next(self._numbers) for _ in asks]
            for key, (ask, sink) in zip(keys, asks, strict=True):
                size = len(ask.prompt)
                self._scheduler.add(Job(key, adapter, size, size + ask.most))
                self._accepted[key] = _Waiting(ask, sink, adapter)
            if adapter is not None and not adapter.is_looked_at and self.limits.mixed != "never":
                self._new.append(adapter)
            self._changed.notify_all()
        return keys

    def cancel(self, keys: Sequence[int]) -> None:
        """Let rows go whose clients want no more; their places are free before the next forward."""
        with self._changed:
            for key in keys:
                self._scheduler.remove(key)
                self._accepted.pop(key, None)
            self._changed.notify_all()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call a function between two forwards.

        Args:
            function: what to call.

        Returns:
            What it returns or raises.
        """
        task = _Task(function)
        with self._changed:
            if self._is_stopped:
                task.result.set_exception(ClosedError("The server has ended."))
            else:
                self._tasks.append(task)
                self._changed.notify_all()
        return task.result

    def close(self) -> None:
        """Take no further rows. Those that were accepted go on."""
        with self._changed:
            self._is_closed = True

    def stop(self) -> None:
        """Tell all rows that are left of the end, put the base weights back, and end the thread."""
        with self._changed:
            self._is_closed = self._is_stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    start = time.perf_counter()
                    self._do_tasks()
                    self._look_at_new()
                    with self._changed:
                        whose: list[Any] = self._scheduler.begin_turn()
                    if whose:
                        self._turn(whose)
                    self.counts.busy += time.perf_counter() - start
        finally:
            # Nobody is left waiting, whatever has ended the loop.
            with self._changed:
                self._is_closed = self._is_stopped = True
            self._fail_all(Fault("The server has ended.", "closed"))
            self.weights.put(None)
            self._do_tasks()

    def _wait(self) -> bool:
        """Wait for something to do; whether there will be more."""
        with self._changed:
            while not (self._tasks or self._accepted or self._is_stopped):
                self._changed.wait()
            return not self._is_stopped

    def _do_tasks(self) -> None:
        while True:
            with self._changed:
                if not self._tasks:
                    return
                task = self._tasks.popleft()
            try:
                task.result.set_result(task.function())
            except Exception as error:  # it is the caller's
                task.result.set_exception(error)

    def _look_at_new(self) -> None:
        while self._new:
            adapter = self._new.popleft()
            with self._failing([adapter]):
                self.adapters.look_at(adapter)

    def _turn(self, whose: list[Adapter | None]) -> None:
        """Do a turn.

        Args:
            whose: the adapters of the turn, to which others may be added in the middle of it.
        """
        self.counts.turns += 1
        with self._failing(whose):
            batch = self._batch_of(whose)
            with self._mixed(batch, whose) if self._scheduler.is_shared else self._alone(whose[0]):
                while self._forward(batch, whose):
                    self._do_tasks()
        for each in self._batches:
            self._keep_accepted(each)
        self._batches = [each for each in self._batches if each.rows]

    @contextlib.contextmanager
    def _alone(self, adapter: Adapter | None) -> Generator[None]:
        """Have the blocks of an adapter in the weights."""
        start = time.perf_counter()
        self.weights.put(self.adapters.place(adapter))
        self.counts.switching += time.perf_counter() - start
        yield

    @contextlib.contextmanager
    def _mixed(self, batch: Batch, whose: list[Adapter | None]) -> Generator[None]:
        """Have the base values in the weights, and the blocks of each row of a batch beside them."""
        start = time.perf_counter()
        self.weights.put(None)
        self.counts.switching += time.perf_counter() - start
        group = whose[0].group if whose[0] is not None else None
        assert group is not None
        beside = self._beside
        if beside is None or beside.targets != group:
            # The old one's memory is free before the new one takes any.
            self._beside = beside = None
            self._beside = beside = Beside(self.weights, group, self.limits.rows)

        @contextlib.contextmanager
        def around(first: int, rows: Sequence[Row]) -> Generator[None]:
            start = time.perf_counter()
            with beside.rows(first, [(row.adapter, self._values[row.adapter]) for row in rows]):
                self.counts.switching += time.perf_counter() - start
                yield

        batch.around = around
        try:
            with beside.attached():
                yield
        finally:
            batch.around = no_context
            self._values = {}

    def _batch_of(self, whose: Collection[Adapter | None]) -> Batch:
        """The batch of a turn, which has rows of its adapters alone; that in which most of them stand already."""

        def own(batch: Batch) -> int:
            return sum(row.adapter in whose for row in batch.rows)

        batch = max(self._batches, key=own, default=None)
        if batch is None or not own(batch):
            batch = Batch(self.weights.model)
            self._batches.append(batch)
        elif own(batch) < len(batch.rows):
            self._batches.append(batch.split(lambda row: row.adapter not in whose))
        return batch

    def _forward(self, batch: Batch, whose: Collection[Adapter | None]) -> bool:
        """Do one forward of a turn; whether the turn goes on."""
        self._look_at_new()
        with self._changed:
            batch.keep(lambda row: row.key in self._accepted)
            if self._is_stopped or not self._scheduler.goes_on():
                return False
            keys: list[Any] = [job.key for job in self._scheduler.admit()]
            self._scheduler.step()
            rows = [self._row(key) for key in keys]
        for other in self._batches:
            if other is not batch and any(row.adapter in whose for row in other.rows):
                batch.absorb(other.split(lambda row: row.adapter in whose))
        is_mixed = self._scheduler.is_shared
        if is_mixed:
            self._read_values({row.adapter for row in (*rows, *batch.rows)})
            self._keep_accepted(batch)
            with self._changed:
                rows = [row for row in rows if row.key in self._accepted]
        if not rows and not batch.rows:
            return True
        pieces = batch.join(rows) if rows else batch.step()
        self.counts.forwards += 1
        self.counts.prompt_tokens += sum(len(row.ask.prompt) for row in rows)
        self.counts.rows_forwarded += len(pieces)
        self.counts.written_tokens += len(pieces)
        if is_mixed:
            self.counts.mixed_forwards += 1
            self.counts.mixed_rows += len(pieces)
        for row, piece in pieces:
            self._tell(row.key, piece, is_last=piece.end is not None)  # pyrefly: ignore[bad-argument-type]
        return True

    def _row(self, key: int) -> Row:
        waiting = self._accepted[key]
        return Row(key, waiting.ask, self._tokenizer, waiting.adapter)

    def _read_values(self, adapters: set[Adapter]) -> None:
        """Have the values of adapters at hand. Those that cannot be read end their own rows."""
        for adapter in adapters - self._values.keys():
            with self._failing([adapter]):
                start = time.perf_counter()
                self._values[adapter] = self.adapters.blocks(adapter)
                self.counts.switching += time.perf_counter() - start

    def _keep_accepted(self, batch: Batch) -> None:
        """Let rows leave a batch that have ended, or whose clients have gone."""
        with self._changed:
            batch.keep(lambda row: row.key in self._accepted)

    @contextlib.contextmanager
    def _failing(self, adapters: Collection[Adapter | None]) -> Generator[None]:
        """What goes wrong inside ends the rows of these adapters, and no others."""
        try:
            yield
        except UserError as fault:
            self._fail(adapters, Fault(str(fault), "adapter"))
        except Exception as error:  # a model's own code can fail with anything
            if is_out_of_memory(error):
                message = "Memory ran out; lower the server's --cache-tokens or --batch-size, or ask for less."
                self._fail(adapters, Fault(message, "memory"))
            else:
                self._fail(adapters, Fault(f"{type(error).__name__}: {first_line(error)}", "error"))

    def _fail(self, adapters: Collection[Adapter | None], fault: Fault) -> None:
        with self._changed:
            keys = [key for key, waiting in self._accepted.items() if waiting.adapter in adapters]
        for key in keys:
            self._tell(key, fault, is_last=True)
        self.counts.faults += len(keys)

    def _fail_all(self, fault: Fault) -> None:
        with self._changed:
            adapters = {waiting.adapter for waiting in self._accepted.values()}
        self._fail(adapters, fault)

    def _tell(self, key: int, told: Piece | Fault, *, is_last: bool) -> None:
        with self._changed:
            waiting = self._accepted.get(key)
            if is_last:
                self._scheduler.remove(key)
                self._accepted.pop(key, None)
        if waiting is not None:
            waiting.sink(told)
