"""Language models, and the training steps of a method on one of them."""

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

# For the attentions that it knows, transformers makes a mask and asks the GPU whether it is needed. Nothing can be
# asked while a CUDA graph is recorded. Torch's own attention needs no mask for rows without padding. So it is
# registered under a name that transformers does not know.
ATTENTION = "sdpa_without_mask"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)


def load_language(language: Language, device: torch.device) -> tuple[Any, str]:
    """The model in bf16 on the device, without a method, and the origin of its weights in words."""
    model: Any = None
    weights = "random weights"
    if language.source is not None:
        # A machine without a network must find that out at once.
        os.environ.update(PIP_RETRIES="0", PIP_DEFAULT_TIMEOUT="5")
        try:
            model, weights = load_model(resolve_model(language.source), DTYPES["bf16"]), language.source
        except (UserError, ImportError, OSError):
            weights = f"random weights: {language.source} cannot be had here"
    if model is None:
        torch.manual_seed(0)
        with torch.device(device):
            drawn: Any = LlamaForCausalLM(LlamaConfig(**language.shape))
            model = drawn.to(DTYPES["bf16"])
    model.set_attn_implementation(ATTENTION)
    return model.to(device).requires_grad_(False), weights


def batch(language: Language, device: torch.device) -> torch.Tensor:
    """Token ids, ``(rows, length)``. They are the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(language.shape["vocab_size"], (language.rows, language.length), generator=generator).to(device)


@dataclass
class Training:
    """A method on a copy of a model, warmed up and ready for steps.

    Attributes:
        base: the model, which is copied.
        method: name of the method.
        mode: ``eager``, ``CUDA graph`` or ``compiled``.
        language: the model's sizes and its batch.
        device: where it runs.
        prepare: called with the adapted model before anything runs.
        adapted: the model with the method.
        step: runs one training step.
        trained: the trained parameters.
        start: their values before the first step.
        peak: bytes at the peak of the warm-up, beyond those of the model with its method; None without a GPU.
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
            # The layers are compiled one by one: they all use the code of one layer, so that compiling takes a fraction
            # of the time.
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
            # The optimizer is capturable in every mode, so that all modes run the same kernels.
            optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True, capturable=on_gpu)

        def step() -> None:
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            self.adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if optimizer is not None:
                optimizer.step()

        return step

    def _captured(self) -> Callable[[], None]:
        """The whole step as one CUDA graph. It is recorded after a warm-up on a stream of its own."""
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
    """The decoder layers of a Llama-like model, also where other modules wrap it."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[0].endswith("layers")]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the tensors, which later steps do not change."""
    return [tensor.detach().clone() for tensor in tensors]


def give_back(device: torch.device) -> None:
    """Free the memory that nobody uses, on the GPU too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
