"""One layer, forward and backward, with every method."""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.measuring import Run, timed
from benchmarks.gpu.recorder import NotThereError, Recorder
from benchmarks.gpu.sizes import Sizes
from benchmarks.harness import DTYPES
from benchmarks.layer import OneLayer
from benchmarks.methods import BESIDE, FROZEN, IN_PLACE, build
from diablo.models.loading import count_parameters

COMPILED_LORA = "LoRA, compiled"
METHODS = (FROZEN, IN_PLACE, BESIDE, "LoRA", "MiSS", "OFT", "DoRA", "loralib", COMPILED_LORA)


def compile_options(device: torch.device) -> dict[str, Any]:
    """Arguments of torch.compile. On a CPU, which is for rehearsals, no code is generated."""
    return {"dynamic": False, "backend": "inductor" if device.type == "cuda" else "aot_eager"}


class Bench:
    """A layer of one size, with its input and the gradient of its output.

    Args:
        size: inputs, outputs and tokens.
        sizes: how it is measured.
        device: where it runs.
    """

    def __init__(self, size: tuple[int, int, int], sizes: Sizes, device: torch.device) -> None:
        in_features, out_features, tokens = size
        self.sizes, self.device = sizes, device
        torch.manual_seed(0)
        factory: dict[str, Any] = {"device": device, "dtype": DTYPES["bf16"]}
        self.base = OneLayer(in_features, out_features).to(**factory)
        self.x = torch.randn(tokens, in_features, requires_grad=True, **factory)
        self.grad = torch.randn(tokens, out_features, **factory)
        self.frozen = self.runner(build(FROZEN, copy.deepcopy(self.base), ["layer"], sizes.layer_blocks))

    def runner(self, model: nn.Module, called: Any = None) -> Run:
        """A function that runs the forward and backward of a model, or of ``called`` in its place."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        call = model if called is None else called

        def run() -> None:
            self.x.grad = None
            for parameter in trained:
                parameter.grad = None
            call(self.x).backward(self.grad)

        return run

    def measure(self, method: str) -> dict[str, Any]:
        """Time a method, in turn with the frozen layer.

        Raises:
            NotThereError: the method's library is not installed.
        """
        if method == "loralib" and find_spec("loralib") is None:
            raise NotThereError("not installed")
        if method == FROZEN:
            return {"parameters": 0, **timed(self.frozen, None, self.sizes, self.device)}
        name = "LoRA" if method == COMPILED_LORA else method
        model = build(name, copy.deepcopy(self.base), ["layer"], self.sizes.layer_blocks)
        called = torch.compile(model, **compile_options(self.device)) if method == COMPILED_LORA else model
        figures = timed(self.runner(model, called), self.frozen, self.sizes, self.device)
        return {"parameters": count_parameters(model)[0], **figures}


def measure(recorder: Recorder, sizes: Sizes, device: torch.device) -> None:
    """Measure a row for every size and method."""
    for in_features, out_features, tokens in sizes.layers:
        bench = Bench((in_features, out_features, tokens), sizes, device)
        for method in METHODS:
            recorder.row(
                partial(bench.measure, method),
                in_features=in_features,
                out_features=out_features,
                tokens=tokens,
                method=method,
            )
