"""Is the gradient of a block that block of full fine-tuning's gradient, in every layer of a real model?

    python -m experiments.gradient_identity

The paper's section 3: no factor stands between a block and the loss, so grad D_i = X_i^T G_i is what full fine-tuning
computes for that block. Here both gradients are computed for one batch of word problems, at the pretrained weights and
away from them, with the blocks beside the weight and in it, and the largest difference in each layer is reported,
relative to the largest entry of the gradient there. What remains is rounding: it falls with the precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import get_peft_model

from diablo import DiabloConfig, DiabloLayer
from diablo.models.loading import load_model
from diablo.planning.plan import Plan
from experiments.finetuning import batch_of, completion_loss, plan_data
from experiments.harness import Experiment, Model, Seed

QUESTION = "the largest difference between a block's gradient and full fine-tuning's, relative to the largest entry"

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def layers_of(model: Any) -> dict[str, DiabloLayer]:
    """The adapted layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DiabloLayer)}


def measure(plan: Plan, num_blocks: int, dtype: torch.dtype, std: float, *, in_place: bool, seed: int) -> list[float]:
    """The relative difference in each layer.

    Args:
        plan: the model and a batch.
        num_blocks: N.
        dtype: dtype of everything.
        std: standard deviation of the blocks' values; 0 is the start of training.
        in_place: whether the blocks stand in the weight.
        seed: seed of the blocks' values.
    """
    batch = batch_of(plan, plan.sampler.batches()[0])
    model = load_model(plan.model_name, dtype, plan.recipe.attention).to(plan.device)
    adapted = get_peft_model(model, DiabloConfig(num_blocks=num_blocks, in_place=in_place)).to(dtype).train()
    torch.manual_seed(seed)
    layers = layers_of(adapted)
    for layer in layers.values():
        torch.nn.init.normal_(layer.blocks_of("default")["weight"], std=std)
    completion_loss(adapted, batch).backward()
    blocks: dict[str, Any] = {name: layer.blocks_of("default")["weight"].grad for name, layer in layers.items()}
    layouts = {name: layer.layouts_of("default")["weight"] for name, layer in layers.items()}
    # Full fine-tuning, from the same weights.
    merged: Any = adapted.merge_and_unload().requires_grad_(True)
    completion_loss(merged, batch).backward()
    differences = []
    for name, layout in layouts.items():
        whole = merged.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        pairs = [(tile.of_weight(whole), tile.of_blocks(blocks[name])) for tile in layout.tiles]
        differences.append(max((ours - theirs).abs().max().item() for theirs, ours in pairs) / whole.abs().max().item())
    return differences


def run(model: Model = "builtin:smollm2-135m", num_blocks: int = 64, rows: int = 8, seed: Seed = 0) -> dict[str, Any]:
    """Measure in two precisions, at zero and away from it, beside and in place.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        num_blocks: N.
        rows: rows of the batch.
        seed: seed.
    """
    plan = plan_data(model, rows, 1, rows, num_blocks, seed)
    found = []
    for precision, dtype in DTYPES.items():
        for std in (0.0, 0.02):
            for in_place in (True, False):
                differences = measure(plan, num_blocks, dtype, std, in_place=in_place, seed=seed)
                found.append(
                    {
                        "precision": precision,
                        "blocks": "zero" if std == 0 else f"normal, std {std}",
                        "path": "in place" if in_place else "beside",
                        "layers": len(differences),
                        "largest": max(differences),
                        "differences": differences,
                    }
                )
    return {"cases": found}


def draw(figure: Any, results: dict[str, Any]) -> None:
    """The difference in each layer."""
    axes = figure.subplots()
    for number, case in enumerate(results["cases"]):
        label = f"{case['precision']}, blocks {case['blocks']}, {case['path']}"
        # A difference of none at all has no place on a logarithmic axis.
        shown = [max(value, 1e-18) for value in case["differences"]]
        axes.plot(shown, ".", color=f"C{number}", markersize=3, label=label)
    axes.set(yscale="log", xlabel="adapted layer", ylabel="largest difference / largest entry")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for case in results["cases"]:
        yield (
            f"{case['precision']}, blocks {case['blocks']}, {case['path']}: at most {case['largest']:.1e} in "
            f"{case['layers']} layers"
        )


EXPERIMENT = Experiment("gradient-identity", QUESTION, run, report, draw)

if __name__ == "__main__":
    EXPERIMENT.main()
