"""Switching a model that has an adapter merged into its weights to another adapter, in all layers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import diablo
from benchmarks.gpu.measuring import gpu_time
from benchmarks.gpu.models import TARGETS, load_language
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import time_interleaved
from benchmarks.methods import equal_size


def with_two_adapters(base: Any, config: Any) -> Any:
    """A copy of a model with two random adapters ``a`` and ``b``. Adapter ``a`` is merged."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), config, "a")
    model.add_adapter("b", config)
    for name, parameter in model.named_parameters():
        if ".a." in f"{name}." or ".b." in f"{name}.":
            parameter.data.normal_(std=0.01)
    model.eval().merge_adapter(["a"])
    return model


def measure(recorder: Recorder, sizes: Sizes, device: torch.device) -> None:
    """Measure a row for every way to switch, on the first model."""
    language = sizes.languages[0]
    base, _ = load_language(language, device)

    def timed_alone(model: Any, switch: Callable[[str], None]) -> dict[str, Any]:
        def both() -> None:
            switch("b")
            switch("a")

        # Two switches bring the model back to its first state, so that every run starts from the same state.
        times = time_interleaved({"both": both}, sizes.rounds, device, 1, sizes.at_least)
        switched = [name for name, module in model.named_modules() if name.rpartition(".")[2] in TARGETS]
        return {
            "layers": len(switched),
            "seconds": times["both"].median / 2,
            **gpu_time(both, device, 2),
            "rounds": [seconds / 2 for seconds in times["both"].seconds],
        }

    def set_adapter() -> dict[str, Any]:
        model = with_two_adapters(base, diablo.DiabloConfig(num_blocks=language.num_blocks, target_modules=TARGETS))
        return timed_alone(model, model.set_adapter)

    def hotswap() -> dict[str, Any]:
        model = with_two_adapters(base, diablo.DiabloConfig(num_blocks=language.num_blocks, target_modules=TARGETS))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = Path(folder)
            return timed_alone(model, lambda name: diablo.hotswap_adapter(model, saved / name, "a"))

    def lora() -> dict[str, Any]:
        rank = equal_size(lambda r: LoraConfig(r=r), base, TARGETS, language.num_blocks)
        model = with_two_adapters(base, LoraConfig(r=rank, target_modules=TARGETS))

        def switch(name: str) -> None:
            model.unmerge_adapter()
            model.set_adapter(name)
            model.merge_adapter([name])

        return timed_alone(model, switch)

    ways = {
        "DiaBlo: set_adapter": set_adapter,
        "DiaBlo: hotswap_adapter, from a file": hotswap,
        "LoRA: unmerge, set_adapter, merge": lora,
    }
    for way, run in ways.items():
        recorder.row(run, model=language.name, method=way)
