"""The runs of a comparison in processes of their own, as many side by side as are asked for."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml

from diablo.recipes.recipe import Recipe

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class EndedError(Exception):
    """A run was asked for after all of them had been ended."""


class Processes:
    """Carries recipes out by ``diablo train``, each in a process of its own.

    A run's peak memory is then its own, and a run that crashes ends no other. It may be called from several threads.

    Args:
        shares: the environment variables of each run that goes on side by side with others, as from :func:`shares_of`.
            No more runs than there are shares go on at once.
    """

    def __init__(self, shares: Iterable[dict[str, str]] = ({},)) -> None:
        self._shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for share in shares:
            self._shares.put(share)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def __call__(self, recipe: Recipe) -> str | None:
        """Carry out a recipe. The run writes to a log beside its output folder.

        Returns:
            Why the run failed: its error message, or the last line of its log. None where it did not fail.

        Raises:
            EndedError: :meth:`end` was called.
        """
        share = self._shares.get()
        try:
            process, log = self._begin(recipe, share)
            status = process.wait()
        finally:
            self._shares.put(share)
        with self._lock:
            self._running.remove(process)
            if self._ended:
                raise EndedError
        return None if status == 0 else f"{_reason(log)} (exit status {status}; {log})"

    def _begin(self, recipe: Recipe, share: dict[str, str]) -> tuple[subprocess.Popen[bytes], Path]:
        """The process of a run, and the log that it writes to."""
        settings, log = (recipe.output.with_name(f"{recipe.output.name}.{ending}") for ending in ("yaml", "log"))
        command = [sys.executable, "-m", "diablo_cli", "train", str(settings)]
        with self._lock:
            if self._ended:
                raise EndedError
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
            with log.open("w", encoding="utf-8") as lines:
                process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, env=os.environ | share)
            self._running.add(process)
        return process, log

    def end(self) -> None:
        """End all runs, which would go on training for nobody, and begin none any more."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def shares_of(jobs: int) -> list[dict[str, str]]:
    """The environment variables by which so many runs share the machine.

    Each gets an equal part of the threads, unless ``OMP_NUM_THREADS`` is set. Where there are several CUDA GPUs, the
    runs are dealt out to them in turn.
    """
    if jobs == 1:
        return [{}]
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    # It imports torch, which whoever only asks for help need not wait for.
    from diablo.devices import visible_gpus

    gpus = visible_gpus()
    if len(gpus) < 2:
        return [threads] * jobs
    return [threads | {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(jobs)]


def side_by_side(work: Callable[[_Item], _Result], items: Iterable[_Item], jobs: int) -> list[_Result]:
    """The results of some work on each item, in the items' order.

    With one job the items come one after the other, in the calling thread. With more, as many threads take them in
    their order. Where one of them raises, no further item is begun, and those that were begun are not waited for.
    """
    if jobs == 1:
        return [work(item) for item in items]
    pool = ThreadPoolExecutor(jobs)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def raised_sigterm() -> Generator[None]:
    """Has SIGTERM raise, so that whoever waits for processes can end them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it wrote nothing"])[-1]
