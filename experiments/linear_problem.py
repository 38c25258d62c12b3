"""Least squares: when do diagonal blocks alone reach what training the whole matrix reaches?

    python -m experiments.linear_problem

The paper's section 4: minimise ``1/2 ||X (W + update) - Y||^2`` over the update, with inputs X of rank r. DiaBlo's
block j sees the inputs' j-th slice and writes the outputs' j-th slice. Where the slice has the rank of all inputs,
which takes ``d_in >= r``, it can produce whatever the whole inputs can. LoRA of rank k produces the best approximation
of rank k.
All losses are given as the share of full fine-tuning's gain that is not reached: 0 is as good as the whole matrix,
1 as good as no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experiments.harness import Experiment, Seed

QUESTION = "which share of full fine-tuning's gain in least squares DiaBlo and LoRA of as many parameters do not reach"

CONVEX_RATES = (0.1, 0.5, 1.0, 1.5, 1.9)
"""Of DiaBlo and of the whole matrix, in units of 1 / (the largest curvature); from 2 on they diverge."""
LORA_RATES = tuple(10 ** (exponent / 2) for exponent in range(-6, 2))
"""Of LoRA, whose curvature changes on the way, in units of 1 / (the largest curvature of the whole matrix)."""
STARTS = 3


@dataclass(frozen=True)
class Problem:
    """Least squares with inputs of low rank, in an orthonormal basis of the inputs' columns.

    What lies outside of that basis no update reaches, so it is left out of both sides: the loss of an update is
    ``1/2 ||inputs @ update - targets||^2``, and full fine-tuning reaches 0.

    Attributes:
        inputs: ``(r, width)``, of largest singular value 1.
        targets: ``(r, width)``.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def draw(cls, rank: int, width: int, rows: int, seed: int, target_rank: int | None = None) -> Problem:
        """Draw a problem.

        Args:
            rank: rank of the inputs.
            width: inputs and outputs.
            rows: samples.
            seed: seed.
            target_rank: rank of the update that the targets ask for; that of a Gaussian matrix where None.
        """
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=random)

        inputs = normal(rows, rank) @ normal(rank, width)
        inputs /= torch.linalg.matrix_norm(inputs, 2)
        wanted = (
            normal(width, width) if target_rank is None else normal(width, target_rank) @ normal(target_rank, width)
        )
        noise = 0.1 * normal(rows, width) / rows**0.5
        basis, _, _ = torch.linalg.svd(inputs, full_matrices=False)
        basis = basis[:, :rank]
        return cls(basis.T @ inputs, basis.T @ (inputs @ wanted + noise))

    def missed(self, product: torch.Tensor) -> torch.Tensor:
        """The share of the gain that is missed: ``(..., r, width)`` products of inputs and update -> ``(...)``."""
        return (product - self.targets).square().sum((-1, -2)) / self.targets.square().sum()


def blocks_of(inputs: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The slices of the features that the blocks see: ``(r, width)`` -> ``(N, r, width / N)``."""
    return inputs.unflatten(-1, (num_blocks, -1)).transpose(0, 1)


def best_blocks(problem: Problem, num_blocks: int) -> float:
    """The share missed at DiaBlo's optimum, in closed form: one least-squares problem a block."""
    inputs, targets = blocks_of(problem.inputs, num_blocks), blocks_of(problem.targets, num_blocks)
    solved = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
    return problem.missed((inputs @ solved).transpose(0, 1).flatten(-2)).item()


def best_low_rank(problem: Problem, rank: int) -> float:
    """The share missed at LoRA's optimum, in closed form: the reachable targets' singular values beyond its rank."""
    squares = torch.linalg.svdvals(problem.targets).square()
    return (squares[rank:].sum() / squares.sum()).item()


Product = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def descend(
    problem: Problem, start: Sequence[torch.Tensor], product: Product, rates: torch.Tensor, steps: int
) -> torch.Tensor:
    """Gradient descent from several starts at several rates at once.

    Args:
        problem: the problem.
        start: parameters, each ``(runs, ...)``.
        product: parameters -> ``(runs, r, width)`` products of inputs and update.
        rates: ``(runs,)``.
        steps: how many.

    Returns:
        ``(steps + 1, runs)`` shares missed.
    """
    parameters = [values.clone().requires_grad_() for values in start]
    curve = []
    for _ in range(steps):
        loss = 0.5 * (product(parameters) - problem.targets).square().sum((-1, -2))
        curve.append(loss.detach())
        for values, gradient in zip(parameters, torch.autograd.grad(loss.sum(), parameters), strict=True):
            values.data -= rates.view(-1, *[1] * (values.dim() - 1)) * gradient
    curve.append(0.5 * (product(parameters) - problem.targets).square().sum((-1, -2)).detach())
    return torch.stack(curve) / (0.5 * problem.targets.square().sum())


def descents(problem: Problem, num_blocks: int, ranks: Sequence[int], steps: int, seed: int) -> list[dict[str, Any]]:
    """Gradient descent of each method, at the best of its rates; LoRA from several starts."""
    width = problem.inputs.shape[1]
    slices = blocks_of(problem.inputs, num_blocks)
    block = width // num_blocks

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(len(CONVEX_RATES), *shape, dtype=torch.float64)

    def of_blocks(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        return (slices @ parameters[0]).transpose(-3, -2).flatten(-2)

    def of_factors(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        return problem.inputs @ parameters[0] @ parameters[1]

    def convex(inputs: torch.Tensor) -> torch.Tensor:
        return torch.tensor(CONVEX_RATES, dtype=torch.float64) / torch.linalg.matrix_norm(inputs, 2).square().max()

    found = []

    def add(method: str, parameters: int, curve: torch.Tensor, rates: torch.Tensor, starts: int = 1) -> None:
        # A rate is judged by the mean over the starts, so that no lucky start chooses it.
        curve = torch.nan_to_num(curve, nan=torch.inf).view(len(curve), -1, starts)
        best = int(curve[-1].mean(-1).argmin())
        kept = curve[:: max(1, steps // 100), best]
        found.append(
            {
                "method": method,
                "parameters": parameters,
                "rate": rates.view(-1, starts)[best, 0].item(),
                "missed": curve[-1, best].tolist(),
                "curve": kept.mean(-1).tolist(),
            }
        )

    rates = convex(problem.inputs)
    curve = descend(problem, [zeros(width, width)], lambda parameters: problem.inputs @ parameters[0], rates, steps)
    add("full", width * width, curve, rates)
    rates = convex(slices)
    add("diablo", width * block, descend(problem, [zeros(num_blocks, block, block)], of_blocks, rates, steps), rates)
    random = torch.Generator().manual_seed(seed)
    rates = torch.tensor(LORA_RATES, dtype=torch.float64).repeat_interleave(STARTS)
    for rank in ranks:
        first = torch.randn(STARTS, width, rank, dtype=torch.float64, generator=random) / width**0.5
        factors = [first.repeat(len(LORA_RATES), 1, 1), torch.zeros(len(rates), rank, width, dtype=torch.float64)]
        add(f"lora r={rank}", 2 * width * rank, descend(problem, factors, of_factors, rates, steps), rates, STARTS)
    return found


def run(width: int = 64, num_blocks: int = 4, steps: int = 8000, draws: int = 5, seed: Seed = 0) -> dict[str, Any]:
    """Sweep the rank of the inputs in closed form, and descend on both sides of the condition.

    Args:
        width: inputs and outputs.
        num_blocks: N; LoRA's rank of as many parameters is ``width / N / 2``.
        steps: steps of gradient descent.
        draws: problems for each point of the sweep.
        seed: seed.
    """
    block = width // num_blocks
    equal = block // 2
    rows = 2 * width
    sweep = []
    for target_rank in (None, equal):
        for rank in sorted({*range(2, 3 * block + 1, 2), block, block + 1}):
            problems = [Problem.draw(rank, width, rows, seed + number, target_rank) for number in range(draws)]
            sweep.append(
                {
                    "targets": "any update" if target_rank is None else f"an update of rank {target_rank}",
                    "rank_of_inputs": rank,
                    "diablo": sum(best_blocks(problem, num_blocks) for problem in problems) / draws,
                    "lora": sum(best_low_rank(problem, equal) for problem in problems) / draws,
                }
            )
    descended = []
    for rank in (3 * block // 4, 3 * block // 2):
        problem = Problem.draw(rank, width, rows, seed)
        descended.append(
            {
                "rank_of_inputs": rank,
                "optimum": {"diablo": best_blocks(problem, num_blocks), "lora": best_low_rank(problem, equal)},
                "methods": descents(problem, num_blocks, (equal, block), steps, seed),
            }
        )
    return {"block_in": block, "equal_rank": equal, "sweep": sweep, "descent": descended}


def draw(figure: Any, results: dict[str, Any]) -> None:
    """Left, the optima over the rank of the inputs; right, gradient descent where the condition holds and where not."""
    panels = figure.subplots(1, 3)
    targets = list(dict.fromkeys(point["targets"] for point in results["sweep"]))
    for style, wanted in zip(("-", "--"), targets, strict=True):
        points = [point for point in results["sweep"] if point["targets"] == wanted]
        ranks = [point["rank_of_inputs"] for point in points]
        for method, colour in (("diablo", "C0"), ("lora", "C1")):
            panels[0].plot(ranks, [point[method] for point in points], style, color=colour, label=f"{method}, {wanted}")
    panels[0].axvline(results["block_in"], color="grey", linewidth=0.8)
    panels[0].set(xlabel="rank of the inputs", ylabel="share of the gain missed", title="optimum at equal parameters")
    panels[0].legend(fontsize="small")
    for axes, descended in zip(panels[1:], results["descent"], strict=True):
        for found in descended["methods"]:
            axes.plot(
                [max(value, 1e-32) for value in found["curve"]], label=f"{found['method']}: {found['parameters']:,}"
            )
        axes.set(
            yscale="log",
            xlabel="gradient descent (% of the steps)",
            title=f"inputs of rank {descended['rank_of_inputs']}, d_in = {results['block_in']}",
        )
        axes.legend(fontsize="small")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The figures in words."""
    for descended in results["descent"]:
        inputs = f"Inputs of rank {descended['rank_of_inputs']}, blocks of {results['block_in']}"
        yield f"{inputs}; share of the gain missed:"
        for method, missed in descended["optimum"].items():
            yield f"  {method:10} optimum in closed form  {missed:.1e}"
        for found in descended["methods"]:
            worst = max(found["missed"])
            yield (
                f"  {found['method']:10} {found['parameters']:6,} parameters, descended to {worst:.1e}, rate "
                f"{found['rate']:.2g}"
            )


EXPERIMENT = Experiment("linear-problem", QUESTION, run, report, draw, size=(14, 4))

if __name__ == "__main__":
    EXPERIMENT.main()
