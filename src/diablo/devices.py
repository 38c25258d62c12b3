"""The device that computes: which one is taken, the dtype that it computes in, and the memory that it has held."""

from __future__ import annotations

import os
import platform
import resource
import sys

import torch

from diablo.errors import UserError

ACCELERATORS = ("cuda", "xpu", "mps")
"""The types of torch's devices, beside the CPU, on which diablo runs. To torch, AMD's GPUs (ROCm) are ``cuda``."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FIRST_MACOS_WITH_BF16 = 14


def choose_device() -> torch.device:
    """The accelerator that torch has, if diablo runs on it; otherwise the CPU.

    It has no index: it is the current device of its type, which in a run of several processes is the process's own.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None and found.type in ACCELERATORS else torch.device("cpu")


def visible_gpus() -> list[str]:
    """The names by which ``CUDA_VISIBLE_DEVICES`` knows the CUDA GPUs that this process sees; empty without any."""
    if choose_device().type != "cuda":
        return []
    numbers = [str(number) for number in range(torch.accelerator.device_count())]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return numbers if allowed is None else allowed.split(",")[: len(numbers)]


def title_of(device: torch.device) -> str:
    """What a device is called in messages: ``a CPU``, ``CUDA``, ``ROCm``, ``XPU`` or ``MPS``."""
    if device.type == "cpu":
        return "a CPU"
    return "ROCm" if device.type == "cuda" and torch.version.hip else device.type.upper()


def describe_device(device: torch.device) -> str | None:
    """An accelerator's name, and what torch runs it by, with its version; None for a CPU."""
    if device.type == "cpu":
        return None
    if device.type == "mps":
        return f"Apple {platform.machine()} (MPS, macOS {platform.mac_ver()[0]})"
    version = (torch.version.hip or torch.version.cuda) if device.type == "cuda" else torch.version.xpu
    return f"{torch.get_device_module(device).get_device_name()} ({title_of(device)} {version})"


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that a recipe's ``precision`` means on a device that is there.

    Raises:
        UserError: as :func:`dtype_for`.
    """
    return dtype_for(precision, device.type, has_bf16=_has_bf16(device))


def dtype_for(precision: str, device_type: str, *, has_bf16: bool) -> torch.dtype:
    """The dtype that a recipe's ``precision`` means on a type of device.

    Args:
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``. ``auto`` is bf16 if the device has it, otherwise fp32.
        device_type: of torch's device.
        has_bf16: whether the device computes in bf16 by itself.

    Raises:
        UserError: fp16 on a CPU or MPS, where gradients cannot be scaled; bf16 on MPS before macOS 14.
    """
    if precision == "fp16" and device_type in ("cpu", "mps"):
        name = "a CPU" if device_type == "cpu" else "MPS, which has no scaler of gradients,"
        raise UserError(f"precision: found fp16; {name} takes auto, bf16 or fp32.")
    if precision == "bf16" and device_type == "mps" and not has_bf16:
        raise UserError(
            f"precision: found bf16, which MPS has from macOS {_FIRST_MACOS_WITH_BF16} on; take auto or fp32, or "
            "update macOS."
        )
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    return parse_dtype(precision)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype called ``bf16``, ``fp16`` or ``fp32``, which are those that :mod:`diablo.models.choices` checks."""
    return _DTYPES[name]


def _has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 by itself. NVIDIA's do from compute capability 8.0 on."""
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(_FIRST_MACOS_WITH_BF16, 0)
    return torch.get_device_module(device).is_bf16_supported(including_emulation=False)


def can_pin_memory(device: torch.device) -> bool:
    """Whether batches in pinned memory are copied to a device faster. MPS shares the memory of the CPU."""
    return device.type in ("cuda", "xpu")


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_bytes() -> int:
    """The most memory that was held so far, in bytes: by the accelerator where there is one, otherwise by the process.

    MPS keeps no peak. Its figure is what the driver holds at present for the process, with what torch keeps for later.
    """
    device = choose_device()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    # Allocators without an error of their own: that of the CPU, and that of MPS.
    said = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)
