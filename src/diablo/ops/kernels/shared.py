"""What all kernels need: torch's dtypes in Triton, options, rounding, and the device that a launch goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

TRITON_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# Whether the compiler may fuse products with sums. Triton 3.9 warns where this is not given, and Triton 3.10 does not
# fuse by default.
OPTIONS = {"enable_fp_fusion": True}


TILE = 2048
"""Entries that one program handles in a kernel that only reads and writes: a tile, in Triton's sense of the word."""


def on(device: torch.device) -> AbstractContextManager[None]:
    """A context that makes ``device`` the current one: Triton launches there, wherever the tensors are."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@triton.jit
def rounded(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """fp32 or fp64 values in ``dtype``, rounded as torch rounds: to the nearest, ties to even."""
    if dtype == tl.bfloat16:
        # Triton's interpreter cuts the digits off instead of rounding. The rounding is written out here, so that tests
        # in the interpreter test what a GPU does.
        bits = values.to(tl.float32).to(tl.uint32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        upper = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, upper)  # not a number
        return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if dtype == tl.float16:
        # torch goes from fp64 to fp16 through fp32.
        return values.to(tl.float32).to(tl.float16)
    return values.to(dtype)


INTERPRETED = not isinstance(rounded, triton.JITFunction)
"""Whether Triton was imported with ``TRITON_INTERPRET=1``: then the kernels run on the CPU, slowly."""
