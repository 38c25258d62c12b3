"""Muon for blocks: an optimizer that orthogonalises the update of each block as a matrix of its own.

torch's Muon takes matrices alone. DiaBlo's parameters are stacks of matrices, ``(N, d_in, d_out)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer, ParamsT

# The coefficients of the quintic iteration and the smallest norm that is divided by: Keller Jordan,
# https://kellerjordan.github.io/posts/muon/
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALLEST_NORM = 1e-7
_MOST_STEPS = 99

# Moonshot: "Muon is Scalable for LLM Training", arXiv 2502.16982, section 2.2.
_RMS_OF_ADAMW = 0.2


class Muon(Optimizer):
    """Muon on the matrices in the last two dimensions of a parameter, and AdamW on parameters without a matrix.

    A parameter of two dimensions is one matrix, one of more is a stack of them. With the gradient g of a matrix, its
    momentum B, the rate and the decay, a step is::

        B      <- momentum * B + (1 - momentum) * g
        update  = momentum * B + (1 - momentum) * g     (nesterov; B without)
        matrix <- (1 - rate * decay) * matrix - rate * 0.2 * sqrt(max(rows, columns)) * orthogonal(update)

    The momentum and the orthogonalisation are Keller Jordan's (https://kellerjordan.github.io/posts/muon/), with the
    momentum as an average, as torch has it. The decay and the factor of the rate are those of "Muon is Scalable for LLM
    Training" (arXiv 2502.16982, section 2.2). With this factor an update has the root mean square that is usual for
    AdamW (arXiv 1711.05101), so that one rate serves matrices of all shapes, and the parameters of AdamW too. A step on
    a matrix is that of ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``, up to rounding.

    The state has one value for each value of a matrix, where AdamW's has two. Both are of the parameter's dtype.

    Args:
        params: parameters, or groups of them with settings of their own.
        lr: learning rate.
        weight_decay: how strongly parameters are pulled to 0, in shares of the rate.
        momentum: how much of the last momentum stays, from 0 to below 1.
        nesterov: whether the update looks one step ahead.
        ns_steps: steps of the Newton-Schulz iteration.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, and is {value}")
        for name, value in (("momentum", momentum), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to below 1, and is {value}")
        if not isinstance(ns_steps, int) or not 1 <= ns_steps <= _MOST_STEPS:
            raise ValueError(f"ns_steps must be an integer from 1 to {_MOST_STEPS}, and is {ns_steps}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "betas": betas,
            "eps": eps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """Change every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients once more.

        Returns:
            What the closure returns; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in given:
                if parameter.dim() >= 2:
                    self._step_of_muon(parameter, group)
            self._step_of_adamw([parameter for parameter in given if parameter.dim() < 2], group)
        return loss

    def _step_of_muon(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        update = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        if group["nesterov"]:
            update = gradient.lerp(update, group["momentum"])
        rate = group["lr"] * _RMS_OF_ADAMW * math.sqrt(max(parameter.shape[-2:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(orthogonalized(update, group["ns_steps"]), alpha=-rate)

    def _step_of_adamw(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        first, second, steps = (
            [self.state[parameter][name] for parameter in parameters] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        adamw(
            parameters,
            gradients,
            first,
            second,
            [],
            steps,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: torch.Tensor, steps: int) -> torch.Tensor:
    """Each matrix with all its singular values moved close to 1, by Newton-Schulz steps in bf16.

    Args:
        matrices: ``(..., rows, columns)``.
        steps: how many steps. After five, all but the smallest singular values lie between about 0.7 and 1.2.

    Returns:
        A tensor of the same shape, in bf16.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    # The products are smaller on the side of the smaller dimension.
    x = (matrices.mT if is_tall else matrices).bfloat16().reshape(-1, *sorted(matrices.shape[-2:]))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
