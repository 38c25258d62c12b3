"""Interleaved timing, and tables."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

Dtype = Annotated[str, typer.Option(help="fp32 or bf16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one method."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median over the rounds, in seconds."""
        return statistics.median(self.seconds)


def time_interleaved(
    methods: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warmup: int = 2, at_least: float = 0.05
) -> dict[str, Timing]:
    """Time methods in turn, round by round, so that whatever disturbs the machine disturbs them all.

    The order of the methods is turned by one in each round, so that none always follows the same other.

    Args:
        methods: what to time, by name.
        rounds: measured rounds.
        device: where it runs; a GPU is waited for.
        warmup: rounds before these.
        at_least: seconds that a measurement lasts at least, by repetition.
    """

    def once(run: Callable[[], Any], repeats: int) -> float:
        stop = _start_clock(device)
        for _ in range(repeats):
            run()
        return stop() / repeats

    keep_freed_memory()
    names = list(methods)
    repeats = {}
    for name in names:
        once(methods[name], 1)
        repeats[name] = max(1, round(at_least / max(once(methods[name], 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_ in track(
            range(-warmup, rounds), description="rounds", transient=True, disable=not sys.stdout.isatty()
        ):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                taken = once(methods[name], repeats[name])
                if round_ >= 0:
                    seconds[name].append(taken)
    finally:
        gc.enable()
    return {name: Timing(taken) for name, taken in seconds.items()}


def paired_ratio(timing: Timing, reference: Timing) -> float:
    """The median over the rounds of the ratio to the reference in the same round."""
    return statistics.median(a / b for a, b in zip(timing.seconds, reference.seconds, strict=True))


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed: fetching pages from the system anew makes a step's time vary by tenths.

    A GPU's allocator does so by itself; this is for glibc's, and does nothing elsewhere.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
            libc.mallopt(trim_threshold, never)
            libc.mallopt(mmap_threshold, 2**30)


def _start_clock(device: torch.device) -> Callable[[], float]:
    """Start a clock, the GPU's own where there is one; what is returned stops it and gives the seconds."""
    if device.type != "cuda":
        start = time.perf_counter()
        return lambda: time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()

    def stop() -> float:
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    return stop


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
