"""Does the best learning rate of blocks go as one over their rows, in models of several widths?

    python -m experiments.learning_rate_widths

Small models of random weights read the text of this project's pages and half of the word problems of MAWPS, byte by
byte. They go on with the other half by blocks, at rates in steps of two around the rule's, until the best is inside.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from diablo import DiabloConfig
from experiments import learning_rate
from experiments.harness import Experiment, Seed
from experiments.learning_rate import KINDS, RULE, groups_of, median_gain, sweep

QUESTION = "the best learning rate over the width of the model, the number of blocks and the kind of layer"

WIDTHS = (64, 128, 256)
NUM_BLOCKS = (8, 16, 32, 64)
LENGTH, ROWS = 96, 8


@dataclass(frozen=True)
class Setting:
    """What is trained: the model's hidden size, N, and the names of the layers that have blocks."""

    width: int = 128
    num_blocks: int = 16
    targets: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class Texts:
    """Bytes as integers: what the models read first, what they are trained on, and what they are judged by."""

    first: torch.Tensor
    trained: torch.Tensor
    judged: torch.Tensor


def read_texts() -> Texts:
    """The pages of this project, and the problems of MAWPS."""
    pages = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    read = "\n\n".join(page.read_text(encoding="utf-8") for page in pages).encode()
    folder = resources.files("diablo") / "data" / "mawps"
    problems, judged = ((folder / f"{split}.jsonl").read_bytes() for split in ("train", "test"))
    half = len(problems) // 2
    return Texts(*(torch.tensor(list(each)) for each in (read + problems[:half], problems[half:], judged)))


def batches(text: torch.Tensor, number: int, seed: int) -> Iterator[torch.Tensor]:
    """Pieces of a text at random places, of shape (rows, length)."""
    drawn = torch.Generator().manual_seed(seed)
    for _ in range(number):
        starts = torch.randint(len(text) - LENGTH, (ROWS,), generator=drawn)
        yield torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def train(model: nn.Module, groups: list[dict[str, Any]], text: torch.Tensor, steps: int, seed: int) -> None:
    """AdamW with a linear schedule, a short warm-up and clipped gradients."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    model.train()
    for batch in batches(text, steps, seed):
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([each for group in groups for each in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss_on(model: nn.Module, text: torch.Tensor) -> float:
    """Loss per byte, in nats, on the first 32 batches of a text."""
    model.eval()
    pieces = text[: 32 * ROWS * LENGTH].unfold(0, LENGTH, LENGTH)
    return statistics.fmean(model(input_ids=batch, labels=batch).loss.item() for batch in pieces.split(ROWS))


def pretrained(width: int, text: torch.Tensor, steps: int, seed: int) -> LlamaForCausalLM:
    """A Llama of four layers that has read a text."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    train(model, [{"params": list(model.parameters()), "lr": 3e-3 * 128 / width}], text, steps, seed)
    return model


def settings_of(widths: Sequence[int], num_blocks: Sequence[int], kinds: Sequence[str]) -> dict[str, list[Setting]]:
    """The settings of each question."""
    return {
        "width": [Setting(width=width) for width in widths],
        "N": [Setting(num_blocks=number) for number in num_blocks],
        "kind": [Setting(targets=(kind,)) for kind in kinds],
    }


def run(
    widths: Sequence[int] = WIDTHS,
    num_blocks: Sequence[int] = NUM_BLOCKS,
    kinds: Sequence[str] = KINDS,
    steps: int = 80,
    pretraining: int = 800,
    seeds: int = 1,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Sweep every setting.

    Args:
        widths: hidden sizes of the models. N and kinds are tried with that of ``Setting``.
        num_blocks: the N to try.
        kinds: the kinds of layers to try, each alone.
        steps: steps of training blocks.
        pretraining: steps of training the whole model before.
        seeds: runs of each rate.
        seed: the first seed.
    """
    texts = read_texts()
    asked = settings_of(widths, num_blocks, kinds)
    every = list(dict.fromkeys(each for settings in asked.values() for each in settings))
    bases = {width: pretrained(width, texts.first, pretraining, seed) for width in {each.width for each in every}}
    found: dict[Setting, dict[str, Any]] = {}
    for setting in every:
        base = bases[setting.width]

        def loss_at(multiple: float, setting: Setting = setting, base: LlamaForCausalLM = base) -> float:
            losses = [tuned(base, setting, multiple, texts, steps, seed + number) for number in range(seeds)]
            print(f"{setting} at {multiple:g}: {statistics.fmean(losses):.4f}", flush=True)
            return statistics.fmean(losses)

        layers = {"gain": median_gain(adapted(base, setting))}
        found[setting] = {**asdict(setting), **layers, **sweep(loss_at, loss_on(base, texts.judged))}
    return {name: [found[each] for each in settings] for name, settings in asked.items()}


def adapted(base: nn.Module, setting: Setting) -> nn.Module:
    """A copy of a model with the blocks of a setting."""
    config = DiabloConfig(num_blocks=setting.num_blocks, target_modules=list(setting.targets))
    return get_peft_model(copy.deepcopy(base), config)


def tuned(base: nn.Module, setting: Setting, multiple: float, texts: Texts, steps: int, seed: int) -> float:
    """The loss after training blocks."""
    model = adapted(base, setting)
    train(model, groups_of(model, multiple * RULE, "rows"), texts.trained, steps, seed)
    return loss_on(model, texts.judged)


EXPERIMENT = Experiment("learning-rate-widths", QUESTION, run, learning_rate.report, learning_rate.draw, size=(12, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
