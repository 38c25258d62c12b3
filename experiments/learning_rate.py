"""Which learning rate is right for blocks, whatever their number, the width of the model and the kind of layer?

    python -m experiments.learning_rate

Small models of several widths learn the text of this project's pages, byte by byte, and go on with the word problems of
MAWPS by blocks. Every setting is trained at rates in steps of two around the rule's, until the best one is inside.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from diablo import DiabloConfig, DiabloLayer
from experiments.harness import Experiment, Seed

QUESTION = "the best learning rate over the number of blocks, the width of the model, the kind of layer and the steps"

WIDTHS = (64, 128, 256)
NUM_BLOCKS = (4, 8, 16, 32, 64)
FACTORS = ("rows", "one", "gain")
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
LENGTH, ROWS = 96, 8
RULE = 0.1
"""The rate times the rows of a block, as the rule of today has it."""


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        width: hidden size of the model.
        num_blocks: N.
        targets: names of the layers that have blocks.
        steps: steps of training.
        factors: how the rates of the layers differ; see :func:`groups_of`.
    """

    width: int = 128
    num_blocks: int = 16
    targets: tuple[str, ...] = KINDS
    steps: int = 80
    factors: str = "rows"


def text_of_pages() -> torch.Tensor:
    """The bytes of this project's pages."""
    pages = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    return torch.tensor(list("\n\n".join(page.read_text(encoding="utf-8") for page in pages).encode()))


def text_of_problems(split: str) -> torch.Tensor:
    """The bytes of a split of MAWPS."""
    return torch.tensor(list((resources.files("diablo") / "data" / "mawps" / f"{split}.jsonl").read_bytes()))


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
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in pieces.split(ROWS)]
    return sum(losses) / len(losses)


def pretrained(width: int, steps: int, seed: int) -> LlamaForCausalLM:
    """A Llama of four layers that has read the pages."""
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
    train(model, [{"params": list(model.parameters()), "lr": 3e-3 * 128 / width}], text_of_pages(), steps, seed)
    return model


def groups_of(model: nn.Module, rate: float, factors: str) -> list[dict[str, Any]]:
    """Each trained parameter with a rate of its own.

    Args:
        model: has blocks.
        rate: times the rows of a block: what a step can move an output by, for inputs of size one.
        factors: ``"rows"`` divides by the rows of a layer's own blocks, and ``"one"`` by the median of all layers.
            ``"gain"`` divides by its own rows and goes with how strongly the layer itself answers, which is the length
            of a row of its weight, beside the median of all layers.
    """
    trained = [(layer, layer.diablo_blocks["default"]) for layer in layers_of(model)]
    rows = [blocks.shape[-2] for _, blocks in trained]
    gains = [layer.get_base_layer().get_parameter("weight").norm(dim=1).mean().item() for layer, _ in trained]
    groups = []
    for own, gain, (_, blocks) in zip(rows, gains, trained, strict=True):
        share = gain / statistics.median(gains) if factors == "gain" else 1.0
        groups.append({"params": [blocks], "lr": share * rate / (statistics.median(rows) if factors == "one" else own)})
    return groups


def layers_of(model: nn.Module) -> list[DiabloLayer]:
    """The layers that have blocks."""
    return [module for module in model.modules() if isinstance(module, DiabloLayer)]


def sweep(base: LlamaForCausalLM, setting: Setting, seeds: Sequence[int]) -> dict[str, Any]:
    """Train a setting at rates in steps of two, until the best one is inside.

    Returns:
        The setting, the mean loss by the multiple of the rule's rate, and what the rule's rate loses to the best one.
    """
    losses: dict[int, float] = {}

    def loss_at(power: int) -> float:
        if power not in losses:
            losses[power] = statistics.fmean(tuned(base, setting, RULE * 2.0**power, seed) for seed in seeds)
        return losses[power]

    best = min((-1, 0, 1), key=loss_at)
    while best in (min(losses), max(losses)):
        best = min((best - 1, best, best + 1), key=loss_at)
    before = loss_on(base, text_of_problems("test"))
    return {
        **asdict(setting),
        "before": before,
        "losses": {f"{2.0**power:g}": losses[power] for power in sorted(losses)},
        "best": 2.0 ** vertex([losses[best + step] for step in (-1, 0, 1)], best),
        "best_loss": losses[best],
        "rule_loss": losses[0],
        "behind": losses[0] / losses[best] - 1,
        "share_of_gain": (before - losses[0]) / (before - losses[best]),
    }


def vertex(losses: Sequence[float], middle: int) -> float:
    """Where the parabola through three losses, a step apart, is lowest."""
    left, centre, right = losses
    bend = left - 2 * centre + right
    return middle + (0.5 * (left - right) / bend if bend > 0 else 0.0)


def tuned(base: LlamaForCausalLM, setting: Setting, rate: float, seed: int) -> float:
    """The loss on test problems after training blocks."""
    config = DiabloConfig(num_blocks=setting.num_blocks, target_modules=list(setting.targets))
    model = get_peft_model(copy.deepcopy(base), config)
    train(model, groups_of(model, rate, setting.factors), text_of_problems("train"), setting.steps, seed)
    return loss_on(model, text_of_problems("test"))


def settings_of(widths: Sequence[int], num_blocks: Sequence[int], steps: int) -> dict[str, list[Setting]]:
    """The settings of each question."""
    plain = Setting(steps=steps)
    return {
        "width": [replace(plain, width=width) for width in widths],
        "N": [replace(plain, num_blocks=number) for number in num_blocks],
        "kind": [replace(plain, targets=(kind,)) for kind in KINDS],
        "factors": [replace(plain, factors=factors) for factors in FACTORS],
        "steps": [replace(plain, steps=steps * times) for times in (1, 4)],
    }


def run(
    widths: Sequence[int] = WIDTHS,
    num_blocks: Sequence[int] = NUM_BLOCKS,
    steps: int = 80,
    pretraining: int = 500,
    seeds: int = 2,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Sweep every setting.

    Args:
        widths: hidden sizes of the models; N, kinds and steps are tried with ``Setting.width``.
        num_blocks: the N to try.
        steps: steps of training on the problems.
        pretraining: steps of training on the pages.
        seeds: runs of each rate.
        seed: the first seed.
    """
    asked = settings_of(widths, num_blocks, steps)
    used = dict.fromkeys(each.width for settings in asked.values() for each in settings)
    bases = {width: pretrained(width, pretraining, seed) for width in used}
    found: dict[Setting, dict[str, Any]] = {}
    for setting in dict.fromkeys(each for settings in asked.values() for each in settings):
        found[setting] = sweep(bases[setting.width], setting, range(seed, seed + seeds))
        print(next(report({"": [found[setting]]})), found[setting]["losses"], flush=True)
    return {name: [found[each] for each in settings] for name, settings in asked.items()}


def draw(figure: Any, results: dict[str, Any]) -> None:
    """The loss over the multiple of the rule's rate, a panel for each question."""
    panels = figure.subplots(1, len(results), sharey=True)
    for panel, (name, settings) in zip(panels, results.items(), strict=True):
        for each in settings:
            multiples = [float(multiple) for multiple in each["losses"]]
            panel.plot(
                multiples, [loss / each["best_loss"] for loss in each["losses"].values()], "o-", label=label(each, name)
            )
        panel.set(xscale="log", title=name, xlabel="rate / the rule's rate", ylim=(0.995, 1.15))
        panel.set_xscale("log", base=2)
        panel.axvline(1, color="grey", linewidth=0.5)
        panel.legend()
    panels[0].set(ylabel="loss / the best loss")


def label(found: Mapping[str, Any], question: str) -> str:
    """What a line is of."""
    key = {"N": "num_blocks", "kind": "targets"}.get(question, question)
    return found[key][0] if key == "targets" else str(found[key])


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for name, settings in results.items():
        for each in settings:
            targets = each["targets"][0] if len(each["targets"]) == 1 else "all"
            yield (
                f"{name}: width {each['width']}, N {each['num_blocks']}, {targets}, {each['steps']} steps, factors "
                f"{each['factors']}: {each['before']:.3f} -> {each['best_loss']:.4f} at {each['best']:.2f} times the "
                f"rule's rate; the rule's {each['rule_loss']:.4f}, {each['behind']:.2%} behind"
            )


EXPERIMENT = Experiment("learning-rate", QUESTION, run, report, draw, size=(18, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
