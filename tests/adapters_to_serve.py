"""Adapters of random blocks for a tiny model, for tests of what serves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from diablo import DiabloConfig
from diablo.data import RowEncoder
from diablo.models.adapters import load_adapter
from diablo.scoring.generation import complete

PROMPTS = ("Ann had 3 apples.", "The quick brown fox", "user asks", "Equation: x", "a", "Problem: Bob gave her 4 more.")


def make_adapter(model: Path, folder: Path, seed: int, num_blocks: int = 4) -> Path:
    """Save an adapter of random blocks, large enough that it changes what the model writes."""
    config = DiabloConfig(num_blocks=num_blocks, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    return folder


def answers_alone(model: Path, folders: Mapping[str, Path], most: int) -> dict[tuple[str | None, str], str]:
    """What the base model (None) and each adapter write by themselves, prompt by prompt, as in ``diablo generate``."""
    texts = {}
    encoder = RowEncoder(AutoTokenizer.from_pretrained(model))
    for name in (None, *folders):
        if name is None:
            own = AutoModelForCausalLM.from_pretrained(model).eval()
        else:
            own, _ = load_adapter(folders[name], dtype=torch.float32)
        for prompt in PROMPTS:
            ids = encoder.tokenizer(prompt, add_special_tokens=False).input_ids
            texts[name, prompt] = complete(own, encoder, [ids], max_new_tokens=most)[0].text
    return texts
