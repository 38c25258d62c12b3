"""Which code computes on a device: Triton kernels, or torch's functions. Triton is imported when it is first needed."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

import torch
from torch._guards import TracingContext

SWITCH = "DIABLO_KERNELS"
"""Environment variable: ``0`` turns the kernels off; ``cpu`` lets Triton's interpreter run them on the CPU."""


def is_tracing() -> bool:
    """Whether torch.compile traces. Of a backward that is traced, torch 2.12 does not say so by itself."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def kernels_for(device: torch.device) -> ModuleType | None:
    """:mod:`diablo.ops.kernels` where its kernels run on ``device``, otherwise None.

    They run on a GPU of CUDA or ROCm for which Triton compiles. On a CPU they run in Triton's interpreter, which is for
    tests: this takes ``DIABLO_KERNELS=cpu``, and ``TRITON_INTERPRET=1`` set before Triton is imported. No kernel runs
    while torch.compile traces, nor where ``DIABLO_KERNELS=0``.
    """
    if is_tracing():
        return None
    wanted = os.environ.get(SWITCH, "")
    if device.type not in ("cuda", "cpu") or wanted == "0":
        return None
    if device.type == "cpu":
        return _interpreted() if wanted == "cpu" else None
    return _compiled(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _interpreted() -> ModuleType | None:
    kernels = _imported()
    return kernels if kernels is not None and kernels.INTERPRETED else None


@cache
def _compiled(index: int) -> ModuleType | None:
    device = torch.device("cuda", index)
    # Triton has no products of bf16 for NVIDIA GPUs older than Ampere (compute capability 8.0).
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernels = _imported()
    # The interpreter copies a GPU's tensors to the CPU, but not the tensors whose addresses stand in a table: it would
    # read these addresses as the CPU's.
    if kernels is None or kernels.INTERPRETED:
        return None
    try:
        kernels.try_out(device)
    # Triton does not promise a class of error for a missing compiler or driver.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"Triton is installed but compiles no kernel for {device} ({reason}). torch is used.", stacklevel=4
        )
        return None
    return kernels


def _imported() -> ModuleType | None:
    try:
        from diablo.ops import kernels
    except ImportError:
        return None
    return kernels
