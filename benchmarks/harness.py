"""Timing of several methods in turn, and tables."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
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
    """Time methods in turn, round by round, so that whatever disturbs the machine disturbs all of them.

    In each round another method comes first, and the others follow in their order.

    Args:
        methods: the calls to time, by name.
        rounds: number of measured rounds.
        device: where the calls run. On a GPU the time is that of the GPU's own clock.
        warmup: number of rounds before the measured ones.
        at_least: the least number of seconds that one measurement takes. Shorter calls are repeated.

    Returns:
        For each method the seconds of one call in each round.
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
    """The median over the rounds of the ratio of two methods' times in the same round."""
    return statistics.median(a / b for a, b in zip(timing.seconds, reference.seconds, strict=True))


def keep_freed_memory() -> None:
    """Let glibc's allocator keep freed memory. This does nothing where there is no glibc.

    Getting pages from the system again makes the time of a step vary by tenths. torch's allocator for GPUs keeps freed
    memory by itself.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
            libc.mallopt(trim_threshold, never)
            libc.mallopt(mmap_threshold, 2**30)


def _start_clock(device: torch.device) -> Callable[[], float]:
    """Start a clock: the GPU's own where there is one. The returned function stops it and gives the seconds."""
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


def start_peak(device: torch.device) -> int:
    """Forget the peak so far, which comes from loading the model. Returns the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_of(device: torch.device) -> int:
    """The most bytes that were held since :func:`start_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """A figure about this process from Linux's ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
