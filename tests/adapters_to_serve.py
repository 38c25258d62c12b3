"""Adapters of random blocks for a tiny model, for tests of what serves them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from diablo import DiabloConfig

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
