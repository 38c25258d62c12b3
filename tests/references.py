"""Twins of the library's geometry and product, written from the paper and sharing no code with it.

They are loops over single blocks and entries, so that whoever reads them can see that they are right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

# (in_features, out_features, num_blocks)
LAYOUTS = {
    "divisible": (12, 8, 4),
    "divisible_square": (16, 16, 4),
    "ragged_in": (10, 8, 4),
    "ragged_out": (12, 7, 4),
    "ragged_both": (7, 5, 3),
    "ragged_in_ends_at_output_edge": (10, 9, 4),
    "one_block": (6, 4, 1),
    "one_block_ragged_sizes": (7, 3, 1),
    "as_many_blocks_as_outputs": (9, 4, 4),
    "as_many_blocks_as_inputs": (3, 8, 3),
    "scalar": (1, 1, 1),
    # ceil(9/4) = 3 covers the input with 3 blocks, the output takes 4: block 3 has no input at all.
    "whole_block_past_input": (9, 8, 4),
    # The other way round: block 3 has no output.
    "whole_block_past_output": (8, 9, 4),
    # 6 of 6 stored blocks are needed by one side, 3 by the other: several whole blocks lie outside.
    "many_blocks_past_input": (7, 30, 6),
    "fewer_stored_than_asked": (9, 9, 4),
    "odd_large": (1023, 21, 8),
    "odd_large_transposed": (21, 1023, 8),
}


def loop_product(x: torch.Tensor, blocks: torch.Tensor, out_features: int) -> torch.Tensor:
    """``x @ blockdiag(blocks)``: the input padded to ``N * d1``, one block after the other, the output cut."""
    count, rows, columns = blocks.shape
    padding = torch.zeros(*x.shape[:-1], count * rows - x.shape[-1], dtype=x.dtype)
    padded = torch.cat([x, padding], dim=-1)
    parts = []
    for i in range(count):
        parts.append(padded[..., i * rows : (i + 1) * rows] @ blocks[i].to(x.dtype))
    y = torch.cat(parts, dim=-1)
    assert y.shape[-1] == count * columns >= out_features, "the blocks do not cover the output"
    return y[..., :out_features]


def dense_delta(blocks: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """The ``(out_features, in_features)`` matrix that ``nn.Linear`` would add, entry by entry."""
    count, rows, columns = blocks.shape
    entries = blocks.tolist()
    delta = torch.zeros(out_features, in_features, dtype=blocks.dtype)
    for i in range(count):
        for r in range(rows):
            for c in range(columns):
                if i * rows + r < in_features and i * columns + c < out_features:
                    delta[i * columns + c, i * rows + r] = entries[i][r][c]
    return delta


class SavedBytes:
    """Bytes of the distinct tensors that autograd keeps, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}
        self.kept: list[torch.Tensor] = []

    def __enter__(self) -> SavedBytes:
        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                self.storages[storage.data_ptr()] = storage.nbytes()
                self.kept.append(tensor)
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.hooks.__exit__(*exception)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def allocations(forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None]) -> tuple[int, int]:
    """Bytes that torch's allocator for the CPU has given out and not taken back, over those at the start.

    Returns:
        Those at the end of ``forward``, while its result lives, and the most until the end of ``backward`` of it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = forward()
        with torch.profiler.record_function("end of forward"):
            pass
        backward(result)
    held = most = at_end = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
        elif event.name() == "end of forward":
            at_end = held
    return at_end, most
