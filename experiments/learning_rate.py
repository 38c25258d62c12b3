"""Which learning rate is right for blocks, whatever their number, the kind of layer and the scale of its inputs?

    python -m experiments.learning_rate

A real model is trained on word problems of MAWPS, at rates in steps of two around a rule's, until the best one is
inside. The rate that is given goes as one over the rows of a block; what else it could go with is tried beside that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from diablo import DiabloLayer
from diablo.planning.plan import Plan
from diablo.recipes.methods import DiabloMethod
from diablo.scoring.generation import held_out_loss
from diablo.tuner.rates import gain_of
from experiments.finetuning import finetune, load_adapted, plan_data
from experiments.harness import Experiment, Model, Seed

QUESTION = "the best learning rate over the number of blocks, the kind of layer and the scale of its inputs"

NUM_BLOCKS = (16, 64, 8, 32, 128)
FACTORS = ("rows", "one", "gain")
KINDS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
FARTHEST = 8
"""Steps of two to either side, after which a sweep ends wherever the best rate is."""
RULE = 0.1
"""The rate of a rule that the sweeps begin at, times the rows of a block. The tuner's own rule comes from what they
find."""


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        num_blocks: N.
        targets: names of the layers that have blocks.
        factors: how the rates of the layers differ; see :func:`groups_of`.
        scale: what the weights of q, k, v, gate and up are multiplied by, and the norms before them divided by. The
            model computes the same.
    """

    num_blocks: int = 16
    targets: tuple[str, ...] = KINDS
    factors: str = "rows"
    scale: float = 1.0


def layers_of(model: nn.Module) -> list[DiabloLayer]:
    """The layers that have blocks."""
    return [module for module in model.modules() if isinstance(module, DiabloLayer)]


def weight_of(layer: DiabloLayer) -> torch.Tensor:
    """The base weight of a linear layer, of shape (out, in)."""
    return layer.get_base_layer().get_parameter("weight")


def median_gain(model: nn.Module) -> float:
    """The median gain of the layers that have blocks."""
    return statistics.median(gain_of(weight_of(layer)) for layer in layers_of(model))


def groups_of(model: nn.Module, step: float, factors: str, usual: float = 1.0) -> list[dict[str, Any]]:
    """The blocks of each layer with a rate of their own.

    Args:
        model: has blocks.
        step: the rate times the rows of a block: what a step of Adam can move an output by, for inputs of size one.
        factors: ``"rows"`` divides by the rows of a layer's own blocks, and ``"one"`` by the median of all layers.
            ``"gain"`` divides by its own rows and multiplies by its gain, in units of the usual one.
        usual: the gain at which ``"gain"`` and ``"rows"`` are the same.
    """
    layers = layers_of(model)
    rows = [layer.diablo_layout["default"].block_in for layer in layers]
    groups = []
    for layer, own in zip(layers, rows, strict=True):
        share = gain_of(weight_of(layer)) / usual if factors == "gain" else 1.0
        rate = share * step / (statistics.median(rows) if factors == "one" else own)
        groups.append({"params": [layer.diablo_blocks["default"]], "lr": rate})
    return groups


def sweep(loss_at: Callable[[float], float], before: float) -> dict[str, Any]:
    """Find the best multiple of a rule's rate, in steps of two, until it is inside of what was tried.

    Args:
        loss_at: the loss after training at a multiple.
        before: the loss before training.

    Returns:
        The losses by multiple, the best multiple by the parabola through the lowest three, and by how much the loss at
        the rule's own rate is above the lowest, as a share of that and of what training gains.
    """
    losses: dict[int, float] = {}

    def measured(power: int) -> float:
        if power not in losses:
            losses[power] = loss_at(2.0**power)
        return losses[power]

    best = min((-1, 0, 1), key=measured)
    while best in (min(losses), max(losses)) and abs(best) < FARTHEST:
        best = min((best - 1, best, best + 1), key=measured)
    vertex_at = 2.0 ** (best + vertex([measured(best + step) for step in (-1, 0, 1)]))
    return {
        "before": before,
        "losses": {f"{2.0**power:g}": losses[power] for power in sorted(losses)},
        "best": vertex_at,
        "best_loss": losses[best],
        "rule_loss": losses[0],
        "behind": losses[0] / losses[best] - 1,
        "lost": (losses[0] - losses[best]) / (before - losses[best]),
    }


def vertex(losses: Sequence[float]) -> float:
    """Where the parabola through three losses, a step apart, is lowest: in steps from the middle one."""
    left, centre, right = losses
    bend = left - 2 * centre + right
    return 0.5 * (left - right) / bend if bend > 0 else 0.0


@torch.no_grad()
def rescale(model: nn.Module, scale: float) -> None:
    """Divide the norms of a Llama by a scale, and multiply the weights that read them by it: an equal model."""
    for layer in model.get_submodule("model.layers").children():
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            layer.get_parameter(f"{norm}.weight").div_(scale)
            for reader in readers:
                layer.get_parameter(f"{reader}.weight").mul_(scale)


def adapted(plan: Plan, setting: Setting) -> Any:
    """A fresh model with the blocks of a setting."""
    method = DiabloMethod(num_blocks=setting.num_blocks, target_modules=list(setting.targets))
    return load_adapted(plan, method, change=lambda model: rescale(model, setting.scale))


def tuned(plan: Plan, setting: Setting, multiple: float, usual: float) -> float:
    """The held-out loss after training a setting."""
    model = adapted(plan, setting)
    return finetune(model, plan, groups_of(model, multiple * RULE, setting.factors, usual)).held_out_loss


def settings_of(num_blocks: Sequence[int], kinds: Sequence[str], scale: float) -> dict[str, list[Setting]]:
    """The settings of each question."""
    return {
        "factors": [Setting(factors=factors) for factors in FACTORS],
        "scale": [Setting(factors=factors, scale=scale) for factors in ("rows", "gain")],
        "kind": [Setting(targets=(kind,)) for kind in kinds],
        "N": [Setting(num_blocks=number) for number in num_blocks],
    }


def run(
    model: Model = "builtin:smollm2-135m",
    rows: int = 192,
    held_out: int = 128,
    num_blocks: Sequence[int] = NUM_BLOCKS,
    kinds: Sequence[str] = ("down_proj",),
    scale: float = 4.0,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Sweep every setting.

    Args:
        model: a folder, a hub id or ``builtin:NAME``, of a Llama.
        rows: training rows, in batches of 8.
        held_out: test rows for the loss.
        num_blocks: the N to try.
        kinds: the kinds of layers to try, each alone.
        scale: the scale to try.
        seed: seed of the order of the rows.
    """
    plan = plan_data(model, rows, held_out, 8, NUM_BLOCKS[0], seed)
    plain = adapted(plan, Setting())
    before = held_out_loss(plain, plan.held_out, plan.encoder.tokenizer.pad_token_id)
    usual = median_gain(plain)
    asked = settings_of(num_blocks, kinds, scale)
    found: dict[Setting, dict[str, Any]] = {}
    for setting in dict.fromkeys(each for settings in asked.values() for each in settings):

        def loss_at(multiple: float, setting: Setting = setting) -> float:
            loss = tuned(plan, setting, multiple, usual)
            print(f"{setting} at {multiple:g}: {loss:.4f}", flush=True)
            return loss

        layers = {"gain": median_gain(adapted(plan, setting))}
        found[setting] = {**asdict(setting), **layers, **sweep(loss_at, before)}
    return {name: [found[each] for each in settings] for name, settings in asked.items()}


def label(found: Mapping[str, Any], question: str) -> str:
    """What a setting has that others of the same question have not."""
    if question == "kind":
        return str(found["targets"][0])
    if question == "width":
        return str(found["width"])
    if question == "warmup":
        return f"{found['steps']} steps, {found['warmup']} of warm-up"
    if question == "scale":
        return f"x {found['scale']:g}, {found['factors']}"
    return str(found["num_blocks"] if question == "N" else found[question])


def draw(figure: Any, results: dict[str, Any]) -> None:
    """The loss over the multiple of the rule's rate, a panel for each question."""
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (name, settings) in zip(panels, results.items(), strict=True):
        for each in settings:
            multiples = [float(multiple) for multiple in each["losses"]]
            losses = [loss / each["best_loss"] for loss in each["losses"].values()]
            panel.plot(multiples, losses, "o-", label=label(each, name))
        panel.set(title=name, xlabel=f"rate x rows / {RULE:g}", ylim=(0.99, 1.2))
        panel.set_xscale("log", base=2)
        panel.axvline(1, color="grey", linewidth=0.5)
        panel.legend()
    panels[0].set(ylabel="held-out loss / the best")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for name, settings in results.items():
        for each in settings:
            before, best = each["before"], each["best_loss"]
            yield (
                f"{name} {label(each, name)}, gain {each['gain']:.2f}: {before:.3f} -> {best:.4f} "
                f"at {each['best']:.2f} times the rule's rate; at the rule's {each['rule_loss']:.4f}, "
                f"{each['behind']:.1%} above, {each['lost']:.1%} of the gain lost"
            )


EXPERIMENT = Experiment("learning-rate", QUESTION, run, report, draw, size=(16, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
