"""Stands where vLLM is not: the part of it that TRL calls, over a model of transformers.

It shows what an engine is handed and asked for. What vLLM itself makes of that, it does not show.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

__version__ = "0.25.0"
RequestOutput = SimpleNamespace


class SamplingParams(SimpleNamespace):
    """What TRL asks for."""


class LLM:
    """The engine. Each update of its weights is a line of the file that ``STAND_IN_LOG`` names."""

    def __init__(self, model: str, **options: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.names = dict(self.model.named_parameters())
        self.update: dict[str, int] = {}
        runner = SimpleNamespace(model=self)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=options["max_model_len"]),
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)),
        )

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take weights under the names of the checkpoint."""
        for name, values in weights:
            self.names[name].copy_(values)
            self.update[name] = values.numel() * values.element_size()

    def reset_prefix_cache(self) -> None:
        """Told after each update."""
        with Path(os.environ["STAND_IN_LOG"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.update) + "\n")
        self.update = {}

    @torch.no_grad()
    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[RequestOutput]:
        """Complete each prompt by itself; a completion keeps its last token."""
        return [self._complete(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def _complete(self, prompt: list[int], asked: Any) -> RequestOutput:
        ids, written, likelihoods = list(prompt), [], []
        while len(written) < asked.max_tokens and not (written and written[-1] in asked.stop_token_ids):
            logits = self.model(torch.tensor([ids])).logits[0, -1] / asked.temperature
            token = int(torch.multinomial(logits.softmax(-1), 1))
            written.append(token)
            ids.append(token)
            likelihoods.append({token: SimpleNamespace(logprob=logits.log_softmax(-1)[token].item(), rank=1)})
        output = SimpleNamespace(token_ids=written, logprobs=likelihoods)
        return RequestOutput(prompt_token_ids=prompt, outputs=[output])
