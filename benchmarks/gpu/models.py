"""Language models to train steps of, and one training step of a method on one."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.gpu.layers import compile_options
from benchmarks.gpu.measuring import peak_over, start_peak
from benchmarks.gpu.sizes import Language
from benchmarks.harness import DTYPES
from benchmarks.methods import build
from diablo.errors import UserError
from diablo.models.loading import load_model, resolve_model
from diablo.tuner.targets import PAPER_TARGETS

EAGER, GRAPH, COMPILED = "eager", "CUDA graph", "compiled"
TARGETS = list(PAPER_TARGETS)
WARMUP = 3

# transformers makes a mask, and asks the GPU whether it needs one, for the attentions that it knows. Torch's own
# attention needs none for rows without padding, and a CUDA graph cannot be asked anything.
ATTENTION = "sdpa_without_mask"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)


def load_language(language: Language, device: torch.device) -> tuple[Any, str]:
    """The model in bf16 on the device, without a method, and where its weights are from."""
    model: Any = None
    weights = "random weights"
    if language.source is not None:
        # A machine without a network shall say so at once.
        os.environ.update(PIP_RETRIES="0", PIP_DEFAULT_TIMEOUT="5")
        try:
            model, weights = load_model(resolve_model(language.source), DTYPES["bf16"]), language.source
        except (UserError, ImportError, OSError):
            weights = f"random weights: {language.source} cannot be had here"
    if model is None:
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**language.shape)).to(DTYPES["bf16"])
    model.set_attn_implementation(ATTENTION)
    return model.to(device).requires_grad_(False), weights


def batch(language: Language, device: torch.device) -> torch.Tensor:
    """Tokens, ``(rows, length)``, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(language.shape["vocab_size"], (language.rows, language.length), generator=generator).to(device)


@dataclass
class Training:
    """A method on a copy of a model, warmed up and ready for steps.

    Attributes:
        adapted: the model with the method.
        step: one training step.
        trained: the trained parameters.
        start: their values before the first step.
        peak: bytes at the peak of the steps so far over the model with its method; None without a GPU.
        prepare: called on the adapted model before anything is run.
    """

    base: Any
    method: str
    mode: str
    language: Language
    device: torch.device
    prepare: Callable[[Any], None] = lambda adapted: None
    adapted: Any = field(init=False)
    step: Callable[[], Any] = field(init=False)
    trained: list[torch.Tensor] = field(init=False)
    start: list[torch.Tensor] = field(init=False)
    peak: int | None = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.adapted = build(self.method, copy.deepcopy(self.base), TARGETS, self.language.num_blocks)
        embeddings: Any = self.adapted.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, y: y.requires_grad_())
        self.prepare(self.adapted)
        self.trained = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        self.start = copies(self.trained)
        if self.mode == COMPILED:
            # Layer by layer: one layer's code serves all, which takes a fraction of the time to compile.
            for layer in decoder_layers(self.adapted):
                layer.compile(**compile_options(self.device))
        before = start_peak(self.device)
        self.step = self._eager_step()
        if self.mode == GRAPH:
            self.step = self._captured()
        else:
            for _ in range(WARMUP):
                self.step()
        self.peak = peak_over(before, self.device)

    def _eager_step(self) -> Callable[[], None]:
        ids = batch(self.language, self.device)
        on_gpu = self.device.type == "cuda"
        optimizer: Any = None
        if self.trained:
            # Capturable under every mode, so that all run the same kernels.
            optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True, capturable=on_gpu)

        def step() -> None:
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            self.adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()

        return step

    def _captured(self) -> Callable[[], None]:
        """The whole step as one CUDA graph, after warming up on a stream of its own."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def decoder_layers(model: Any) -> list[Any]:
    """The layers of a Llama-like model, whatever wraps it."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their values, which later steps do not change."""
    return [tensor.detach().clone() for tensor in tensors]


def give_back(device: torch.device) -> None:
    """Return what nobody holds to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
