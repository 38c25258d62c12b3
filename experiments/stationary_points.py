"""Two layers: is a point where DiaBlo's gradient vanishes one where full fine-tuning's vanishes too?

    python -m experiments.stationary_points

The paper's section 4: where the inputs X of a layer have a rank that a block's slice of them can hold, X_i^T G_i = 0
for the diagonal blocks makes X_j^T G_i = 0 for all others, since every slice X_j is a combination of X_i's columns. A
network of two linear layers with a nonlinearity between is trained by L-BFGS in float64 until DiaBlo's gradient is
gone; then the gradient of the whole matrices is measured. Two settings have activations of low rank:

- "first layer": as many samples as one likes, whose inputs lie in a subspace. The first layer is trained.
- "both layers": few distinct inputs, each seen many times with targets that differ from time to time, so that the
  hidden activations are of low rank too. Both layers are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import nn

from diablo import DiabloConfig
from experiments.harness import Experiment, Seed

QUESTION = "the gradient of the whole matrices where DiaBlo's gradient is gone, as a share of what it was at the start"

Setting = Literal["first layer", "both layers"]


def draw_inputs(setting: Setting, rank: int, width: int, rows: int) -> torch.Tensor:
    """``(rows, width)`` inputs in a subspace of a rank, or of as many distinct values."""
    directions = torch.randn(rank, width, dtype=torch.float64)
    if setting == "both layers":
        return directions[torch.arange(rows) % rank]
    return torch.randn(rows, rank, dtype=torch.float64) @ directions / rank**0.5


def measure(
    setting: Setting, rank: int, width: int, num_blocks: int, rows: int, iterations: int, seed: int
) -> dict[str, Any]:
    """Train to a stationary point and compare the gradients.

    Args:
        setting: what is of low rank.
        rank: rank of the inputs, or number of distinct ones.
        width: inputs and hidden features; the outputs are a quarter of that.
        num_blocks: N.
        rows: samples.
        iterations: most iterations of L-BFGS.
        seed: seed.
    """
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width // 4)).double()
    inputs = draw_inputs(setting, rank, width, rows)
    targets = torch.randn(rows, width // 4, dtype=torch.float64)
    trained = ["0"] if setting == "first layer" else ["0", "2"]
    config = DiabloConfig(num_blocks=num_blocks, target_modules=trained, in_place=False)
    adapted = get_peft_model(network, config).double()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    # The gradient of a base weight is that of the whole matrix at base plus blocks.
    layers: list[Any] = [network.get_submodule(name) for name in trained]
    weights = [layer.base_layer.weight.requires_grad_() for layer in layers]

    def loss() -> torch.Tensor:
        return (adapted(inputs) - targets).square().mean()

    def norm(of: Sequence[torch.Tensor]) -> float:
        return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss(), of)]).norm().item()

    before = {"loss": loss().item(), "blocks": norm(parameters), "whole": norm(weights)}
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-13,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        value = loss()
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.grad = gradient
        return value

    optimizer.step(closure)
    return {
        "setting": setting,
        "rank": rank,
        "rank_of_hidden": int(torch.linalg.matrix_rank(network[1](network[0](inputs)))),
        "loss_before": before["loss"],
        "loss_after": loss().item(),
        "gradient_of_blocks": norm(parameters) / before["blocks"],
        "gradient_of_whole": norm(weights) / before["whole"],
    }


def run(
    width: int = 64, num_blocks: int = 4, rows: int = 512, iterations: int = 4000, seed: Seed = 0
) -> dict[str, Any]:
    """Measure on both sides of the condition, a rank of at most ``width / num_blocks``.

    Args:
        width: inputs and hidden features.
        num_blocks: N.
        rows: samples.
        iterations: most iterations of L-BFGS.
        seed: seed.
    """
    block = width // num_blocks
    ranks = [block // 4, block // 2, 3 * block // 4, 3 * block // 2, 2 * block, width]
    cases: list[tuple[Setting, int]] = [("first layer", rank) for rank in ranks]
    cases += [("both layers", rank) for rank in (block // 2, block, 4 * width)]
    points = [measure(setting, rank, width, num_blocks, rows, iterations, seed) for setting, rank in cases]
    return {"block_in": block, "points": points}


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Both gradients over the rank."""
    for axes, setting in zip(figure.subplots(1, 2, sharey=True), ("first layer", "both layers"), strict=True):
        points = [point for point in results["points"] if point["setting"] == setting]
        ranks = [point["rank"] for point in points]
        for name, label in (("gradient_of_whole", "whole matrices"), ("gradient_of_blocks", "diagonal blocks")):
            axes.plot(ranks, [point[name] for point in points], "o-", label=label)
        axes.axvline(results["block_in"], color="grey", linewidth=0.8)
        what = "rank of the inputs" if setting == "first layer" else "distinct inputs"
        axes.set(xscale="log", yscale="log", xlabel=f"{what} (line: inputs of a block)", title=f"{setting} trained")
        axes.legend()
    figure.axes[0].set_ylabel("gradient / gradient at the start")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    yield f"Blocks of {results['block_in']} inputs. Gradients as shares of those at the start:"
    for point in results["points"]:
        yield (
            f"  {point['setting']}, rank {point['rank']:3} (hidden {point['rank_of_hidden']}): blocks "
            f"{point['gradient_of_blocks']:.0e}, whole matrices {point['gradient_of_whole']:.0e}, "
            f"loss {point['loss_before']:.3f} -> {point['loss_after']:.3f}"
        )


EXPERIMENT = Experiment("stationary-points", QUESTION, run, report, draw)

if __name__ == "__main__":
    EXPERIMENT.main()
