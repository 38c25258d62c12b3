"""The thread that owns the model: it takes rows in turns by adapter, and tells each row's client what is written."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, TypeVar

import torch

from diablo.devices import is_out_of_memory
from diablo.errors import UserError, first_line
from diablo.serving.adapters import Adapter, Adapters
from diablo.serving.batch import Ask, Batch, Piece, Row
from diablo.serving.scheduling import Job, Limits, Scheduler
from diablo.serving.weights import Weights

T = TypeVar("T")
# What the scheduler calls the base model.
_BASE = "base"


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
        turns: turns of adapters.
        busy: seconds in which there was something to do.
        switching: seconds of these in which adapters were read, placed and written into the weights.
        faults: rows that ended with a fault.
    """

    forwards: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    rows_forwarded: int = 0
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
        self._scheduler = Scheduler(limits)
        self._changed = Condition()
        self._accepted: dict[int, _Waiting] = {}
        self._batches: dict[Adapter | None, Batch] = {}
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
                self._scheduler.add(Job(key, adapter or _BASE, size, size + ask.most))
                self._accepted[key] = _Waiting(ask, sink, adapter)
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
                    with self._changed:
                        whose: Any = self._scheduler.begin_turn()
                    if whose is not None:
                        self._turn(None if whose == _BASE else whose)
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

    def _turn(self, adapter: Adapter | None) -> None:
        self.counts.turns += 1
        with self._failing(adapter):
            start = time.perf_counter()
            self.weights.put(self.adapters.place(adapter))
            self.counts.switching += time.perf_counter() - start
            batch = self._batches.setdefault(adapter, Batch(self.weights.model))
            while self._forward(adapter, batch):
                self._do_tasks()
        if adapter in self._batches and not self._batches[adapter].rows:
            del self._batches[adapter]

    def _forward(self, adapter: Adapter | None, batch: Batch) -> bool:
        """Do one forward of a turn; whether there was one to do."""
        with self._changed:
            batch.keep(lambda row: row.key in self._accepted)
            if self._is_stopped or not self._scheduler.goes_on(adapter or _BASE):
                return False
            jobs = self._scheduler.admit(adapter or _BASE)
            self._scheduler.step()
            asks = [(job.key, self._accepted[job.key].ask) for job in jobs]  # type: ignore[index]
        if asks:
            pieces = batch.join([Row(key, ask, self._tokenizer) for key, ask in asks])
            self.counts.prompt_tokens += sum(len(ask.prompt) for _, ask in asks)
        else:
            pieces = batch.step()
        self.counts.forwards += 1
        self.counts.rows_forwarded += len(pieces)
        self.counts.written_tokens += len(pieces)
        for row, piece in pieces:
            self._tell(row.key, piece, is_last=piece.end is not None)  # type: ignore[arg-type]
        return True

    @contextlib.contextmanager
    def _failing(self, adapter: Adapter | None) -> Iterator[None]:
        """What goes wrong in a turn ends the rows of its adapter, and no others."""
        try:
            yield
        except UserError as fault:
            self._fail(adapter, Fault(str(fault), "adapter"))
        except Exception as error:  # a model's own code can fail with anything
            if is_out_of_memory(error):
                message = "Memory ran out; lower the server's --cache-tokens or --batch-size, or ask for less."
                self._fail(adapter, Fault(message, "memory"))
            else:
                self._fail(adapter, Fault(f"{type(error).__name__}: {first_line(error)}", "error"))

    def _fail(self, adapter: Adapter | None, fault: Fault) -> None:
        self._batches.pop(adapter, None)
        with self._changed:
            keys = [key for key, waiting in self._accepted.items() if waiting.adapter is adapter]
        for key in keys:
            self._tell(key, fault, is_last=True)
        self.counts.faults += len(keys)

    def _fail_all(self, fault: Fault) -> None:
        with self._changed:
            adapters = {waiting.adapter for waiting in self._accepted.values()}
        for adapter in adapters:
            self._fail(adapter, fault)

    def _tell(self, key: int, told: Piece | Fault, *, is_last: bool) -> None:
        with self._changed:
            waiting = self._accepted.get(key)
            if is_last:
                self._scheduler.remove(key)
                self._accepted.pop(key, None)
        if waiting is not None:
            waiting.sink(told)
