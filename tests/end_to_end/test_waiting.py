"""Where the host waits for the device in a training step: on a GPU each wait leaves it idle.

A wait is an operator that needs a value of a tensor before the host can go on. They are the same on a CPU, so that they
can be counted there.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diablo.recipes.reading import load_recipe
from diablo.training import train

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique")


class Waits(TorchDispatchMode):
    """Collects for each operator that waits the names of the Python functions that it was called from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        by_mask = str(func).startswith(("aten.index.", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or str(func).startswith(WAITING):
            self.seen.append([frame.name for frame in traceback.extract_stack()])
        return func(*args, **(kwargs or {}))


def test_waits_are_seen() -> None:
    values = torch.arange(4)
    with Waits() as waits:
        values.sum().item()
        values[values > 1]
        values.index_select(0, values[:2])
    assert len(waits.seen) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_waits_for_nothing_of_ours(tiny_model: Path, tmp_path: Path, attention: str, accumulation: int) -> None:
    rows = [{"prompt": "How many apples? " * (1 + number % 4), "completion": " x = 3"} for number in range(48)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_model}\ndata: {{train: {data}}}\noutput: {tmp_path / 'run'}\n")
    settings = ["method.num_blocks=4", "training.batch_size=4", "training.logging_steps=1000", "precision=bf16"]
    overrides = [*settings, f"attention={attention}", f"training.gradient_accumulation={accumulation}"]
    with Waits() as waits:
        result = train(load_recipe(recipe, overrides))
    assert result.record["training"]["steps"] == 48 // 4 // accumulation
    in_steps = [names for names in waits.seen if "_run_epoch" in names and "get_batch_samples" not in names]
    # Logging asks for the loss and the norm of the gradient: here after the last step, and at no other.
    logged = [names for names in in_steps if "_maybe_log_save_evaluate" in names]
    assert len(logged) == 2
    in_steps = [names for names in in_steps if names not in logged]
    # transformers looks, once a forward and before its first layer, whether rows are packed.
    assert all("find_packed_sequence_indices" in names for names in in_steps), in_steps
    assert len(in_steps) == 48 // 4
