"""Figures that several parts measure: times beside a reference, the GPU's own time, bytes at the peak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.recorder import describe
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import paired_ratio, time_interleaved

Run = Callable[[], Any]


def timed(run: Run, reference: Run | None, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """The seconds of a run, its ratio to a reference that runs in turn with it, and its time on the GPU.

    Args:
        run: the run that is timed.
        reference: the run that it is compared with; itself where None.
        sizes: how many rounds there are, and how long one lasts.
        device: where it runs.
    """
    runs = {"run": run} if reference is None else {"reference": reference, "run": run}
    times = time_interleaved(runs, sizes.rounds, device, warmup=1, at_least=sizes.at_least)
    return {
        "seconds": times["run"].median,
        "ratio_to_frozen": paired_ratio(times["run"], times.get("reference", times["run"])),
        **gpu_time(run, device),
        "rounds": times["run"].seconds,
    }


def gpu_time(run: Run, device: torch.device, calls: int = 1) -> dict[str, Any]:
    """The sum of the times of all kernels and copies of a run on the GPU, by torch's profiler, as ``gpu_seconds``.

    It is None without a GPU, and where the profiler does not work.

    Args:
        run: the run that is profiled.
        device: where it runs.
        calls: number of calls in the run. The time of one call is returned.
    """
    if device.type != "cuda":
        return {"gpu_seconds": None}
    run()
    torch.cuda.synchronize(device)
    try:
        seconds = _profiled_seconds(run, device)
    except Exception as error:
        # Some machines do not allow profiling of their GPU. The times by the clock are still good.
        return {"gpu_seconds": None, "profiler_error": describe(error)}
    return {"gpu_seconds": seconds / calls if seconds else None}


def _profiled_seconds(run: Run, device: torch.device) -> float:
    # Events of the CPU take time to collect and to read. So they are asked for only where kernels are missing without
    # them.
    microseconds = 0.0
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA]):
        with profile(activities=activities) as profiler:
            run()
            torch.cuda.synchronize(device)
        microseconds = sum(
            event.time_range.elapsed_us()
            for event in profiler.events() or []
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )
        if microseconds:
            break
    return microseconds / 1e6


def start_peak(device: torch.device) -> int:
    """Forget the peak so far. Returns the bytes that are held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_over(before: int, device: torch.device) -> int | None:
    """Bytes by which the peak since :func:`start_peak` exceeds what was held then; None without a GPU."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def copy_bandwidth(sizes: Sizes, device: torch.device) -> float:
    """The bytes per second that a large copy within the memory reads and writes."""
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_interleaved({"copy": lambda: target.copy_(source)}, sizes.rounds, device, 1, sizes.at_least)
    return 2 * source.numel() / times["copy"].median
