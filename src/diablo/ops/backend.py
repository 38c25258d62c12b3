"""Which code computes on a device: Triton kernels, or what torch has. Triton is imported where it is first used."""

from __future__ import annotations

import os
import warnings
from functools import cache
from types import ModuleType

import torch

SWITCH = "DIABLO_KERNELS"
"""Environment variable: ``0`` turns the kernels off; ``cpu`` lets Triton's interpreter run them on the CPU."""


def kernels_for(device: torch.device) -> ModuleType | None:
    """:mod:`diablo.ops.kernels` where its kernels run on ``device``, otherwise None.

    They run on a GPU of CUDA or ROCm for which Triton compiles. On a CPU they run in Triton's interpreter, which is for
    tests: with ``TRITON_INTERPRET=1`` from before Triton is imported, and ``DIABLO_KERNELS=cpu``. While torch.compile
    traces, and where ``DIABLO_KERNELS=0``, none do.
    """
    if torch.compiler.is_compiling():
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
    # Triton has no products of bf16 for what came before Ampere.
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    kernels = _imported()
    # The interpreter copies a GPU's tensors, and would take the addresses in a table for the CPU's.
    if kernels is None or kernels.INTERPRETED:
        return None
    try:
        kernels.try_out(device)
    # What a missing compiler or driver raises is Triton's to choose.
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
