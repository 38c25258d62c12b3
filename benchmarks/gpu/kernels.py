"""The gradient of the blocks and the writing of diagonals by themselves, compared with the memory's bandwidth."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.measuring import copy_bandwidth, gpu_time
from benchmarks.gpu.recorder import NotThereError, Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import DTYPES, time_interleaved
from diablo import BlockLayout
from diablo.ops.linear import outer_product

KERNEL, TORCH = "kernel", "torch"
MOST_OPERANDS = 64
SWITCH = "DIABLO_KERNELS"


def our_kernels(device: torch.device) -> Any:
    """The module of the kernels.

    Raises:
        NotThereError: the module is missing, or there is no device for it.
    """
    try:
        from diablo.ops import kernels
    except ImportError as error:
        raise NotThereError(f"not there: {error}") from None
    if device.type != "cuda" and not getattr(kernels, "INTERPRETED", False):
        raise NotThereError("not applicable without a GPU")
    return kernels


@contextmanager
def kernels_off(by: str) -> Generator[None]:
    """Switch the kernels off in the package's own functions, where ``by`` says that torch is measured."""
    before = os.environ.get(SWITCH)
    if by == TORCH:
        os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SWITCH, None)
        else:
            os.environ[SWITCH] = before


def figures_of(
    calls: Sequence[Callable[[], Any]], moved: int, bandwidth: float, sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """The time of a call, with all overheads and on the GPU alone, and the share of the bandwidth that it reaches.

    Args:
        calls: the same call on several sets of operands, which together do not fit into the cache.
        moved: bytes that one call has to read and write.
        bandwidth: bytes per second of a copy.
        sizes: how it is measured.
        device: where it runs.
    """

    def every() -> None:
        for call in calls:
            call()

    times = time_interleaved({"every": every}, sizes.rounds, device, 1, sizes.at_least)
    seconds = times["every"].median / len(calls)
    on_gpu = gpu_time(every, device, len(calls))
    return {
        "seconds": seconds,
        **on_gpu,
        "bytes": moved,
        "share_of_bandwidth": moved / (on_gpu["gpu_seconds"] or seconds) / bandwidth,
        "rounds": [taken / len(calls) for taken in times["every"].seconds],
    }


@torch.no_grad()
def gradient(
    shape: tuple[int, int, int, int], by: str, bandwidth: float, sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """Time the diagonal blocks of ``x^T grad_y``, by torch's products or by the kernel."""
    run = our_kernels(device).outer_product if by == KERNEL else outer_product
    in_features, out_features, num_blocks, tokens = shape
    layout = BlockLayout(in_features, out_features, num_blocks)
    moved = 2 * tokens * (in_features + out_features) + 4 * layout.num_parameters
    torch.manual_seed(0)
    pairs = [
        tuple(torch.randn(tokens, features, device=device, dtype=DTYPES["bf16"]) for features in shape[:2])
        for _ in range(operands(moved, sizes))
    ]
    x, grad = (side.double().unflatten(1, (num_blocks, -1)) for side in pairs[0])
    exact = torch.einsum("tni,tno->nio", x, grad)
    del x, grad
    calls = [partial(run, *pair, layout, torch.float32) for pair in pairs]
    with kernels_off(by):
        return {
            "relative_error": float((calls[0]().double() - exact).norm() / exact.norm()),
            **figures_of(calls, moved, bandwidth, sizes, device),
        }


@torch.no_grad()
def diagonal(
    shape: tuple[int, int, int, int], by: str, what: str, bandwidth: float, sizes: Sizes, device: torch.device
) -> dict[str, Any]:
    """Time the writing or restoring of the diagonals of several weights, by one kernel or by torch, one by one."""
    table = our_kernels(device).DiagonalTable if by == KERNEL else TorchTable
    in_features, out_features, num_blocks, _ = shape
    (tile,) = BlockLayout(in_features, out_features, num_blocks).tiles
    torch.manual_seed(0)
    weights = [torch.randn(out_features, in_features, device=device, dtype=DTYPES["bf16"]) for _ in range(sizes.tables)]
    views = [tile.of_weight(weight) for weight in weights]
    before = [view.clone() for view in views]
    # These have the order of the weight's strides, so that the memory is read and written in order.
    saved = [torch.empty_like(values) for values in before]
    blocks = [torch.randn(view.shape, device=device) for view in views]
    written = [(values.float() + own).to(values.dtype) for values, own in zip(before, blocks, strict=True)]
    diagonals = table(views, blocks, saved)
    diagonals.write()
    is_written = all(map(torch.equal, views, written))
    diagonals.restore()
    is_restored = all(map(torch.equal, views, before))
    # Bytes of each entry. Writing reads the diagonal (2) and the blocks (4), and writes the copy (2) and the diagonal
    # (2). Restoring reads the copy (2) and writes the diagonal (2).
    moved = sum(values.numel() for values in saved) * (2 + 4 + 2 + 2 if what == "write" else 2 + 2)
    figures = figures_of([getattr(diagonals, what)], moved, bandwidth, sizes, device)
    return {"exact": is_written if what == "write" else is_restored, **figures}


class TorchTable:
    """Diagonals written by torch, one weight after the other.

    Args:
        weights: views of the weights' diagonals.
        blocks: the blocks that are added.
        saved: tensors for the base values.
    """

    def __init__(self, weights: list[torch.Tensor], blocks: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
        self.weights, self.blocks, self.saved = weights, blocks, saved

    def write(self) -> None:
        """Save the base values of each diagonal, and add its blocks."""
        for weight, own, values in zip(self.weights, self.blocks, self.saved, strict=True):
            values.copy_(weight)
            torch.add(values, own, out=weight)

    def restore(self) -> None:
        """Put the base values back."""
        for weight, values in zip(self.weights, self.saved, strict=True):
            weight.copy_(values)


def operands(moved: int, sizes: Sizes) -> int:
    """How many sets of operands are needed, so that the first one has left the cache when it comes again."""
    return max(1, min(MOST_OPERANDS, -(-sizes.uncached_bytes // moved)))


def measure(recorder: Recorder, sizes: Sizes, device: torch.device) -> None:
    """Measure a row for the bandwidth, and one for every shape, kind of work and way to do it."""
    bandwidth = copy_bandwidth(sizes, device)
    recorder.row(lambda: {"bytes_per_second": bandwidth}, what="copy")
    for shape in sizes.kernels:
        keys = dict(zip(("in_features", "out_features", "num_blocks", "tokens"), shape, strict=True))
        for by in (TORCH, KERNEL):
            recorder.row(partial(gradient, shape, by, bandwidth, sizes, device), what="gradient", by=by, **keys)
        for what in ("write", "restore"):
            for by in (TORCH, KERNEL):
                recorder.row(partial(diagonal, shape, by, what, bandwidth, sizes, device), what=what, by=by, **keys)
