"""The methods that are compared, each from its own library, with as many trained parameters as DiaBlo has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import C3AConfig, LoraConfig, MissConfig, OFTConfig, ShiraConfig, get_peft_model
from torch import nn

import diablo

IN_PLACE, BESIDE, FROZEN = "DiaBlo in place", "DiaBlo beside", "frozen"


class PlainBlocks(nn.Module):
    """The formula of the paper, written down with einsum: what one would write without this package."""

    def __init__(self, base_layer: nn.Linear, num_blocks: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layout = diablo.BlockLayout(base_layer.in_features, base_layer.out_features, num_blocks)
        self.blocks = nn.Parameter(torch.zeros(self.layout.blocks_shape, device=base_layer.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        y = self.base_layer(x)
        return diablo.block_diagonal_linear_reference(x, self.blocks, self.layout, y)


def _plain(model: nn.Module, targets: list[str], num_blocks: int) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            model.set_submodule(name, PlainBlocks(module, num_blocks))
    return model


def _loralib(model: nn.Module, targets: list[str], num_blocks: int) -> nn.Module:
    import loralib

    rank = nearest(model, targets, num_blocks, lambda i, o, r: r * (i + o))
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            with torch.device(module.weight.device):
                adapted = loralib.Linear(
                    module.in_features, module.out_features, r=rank, bias=module.bias is not None, merge_weights=False
                ).to(module.weight.dtype)
            adapted.weight, adapted.bias = module.weight, module.bias
            model.set_submodule(name, adapted)
    return model


def _shapes(model: nn.Module, targets: list[str]) -> list[tuple[int, int]]:
    return [
        (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    ]


def wanted_parameters(model: nn.Module, targets: list[str], num_blocks: int) -> int:
    """Trained parameters of DiaBlo on these targets."""
    return sum(diablo.BlockLayout(*shape, num_blocks).num_parameters for shape in _shapes(model, targets))


def nearest(
    model: nn.Module,
    targets: list[str],
    num_blocks: int,
    parameters: Callable[[int, int, int], int],
    allowed: Callable[[int, int, int], bool] = lambda i, o, size: True,
) -> int:
    """The size of a method at which its trained parameters come closest to DiaBlo's.

    Args:
        model: the model, without an adapter.
        targets: names of the linear layers.
        num_blocks: DiaBlo's N.
        parameters: of a layer, given its input's length, its output's and the size.
        allowed: whether a layer takes the size.
    """
    shapes = _shapes(model, targets)
    wanted = wanted_parameters(model, targets, num_blocks)
    most = min(min(shape) for shape in shapes)
    sizes = [size for size in range(1, most + 1) if all(allowed(*shape, size) for shape in shapes)]
    return min(sizes, key=lambda size: abs(sum(parameters(*shape, size) for shape in shapes) - wanted))


def build(name: str, model: nn.Module, targets: list[str], num_blocks: int) -> Any:
    """Put a method on a model, in training mode.

    Args:
        name: one of ``METHODS``.
        model: the model; it is changed.
        targets: names of the linear layers to adapt.
        num_blocks: DiaBlo's N, which sets the number of parameters for all methods.
    """

    def size(*arguments: Any) -> int:
        return nearest(model, targets, num_blocks, *arguments)

    if name == FROZEN:
        return model.requires_grad_(False).train()
    if name == "einsum":
        return _plain(model, targets, num_blocks).train()
    if name == "loralib":
        return _loralib(model, targets, num_blocks).train()
    common: dict[str, Any] = {"target_modules": targets}
    configs: dict[str, Callable[[], Any]] = {
        IN_PLACE: lambda: diablo.DiabloConfig(num_blocks=num_blocks, in_place=True, **common),
        BESIDE: lambda: diablo.DiabloConfig(num_blocks=num_blocks, in_place=False, **common),
        "LoRA": lambda: LoraConfig(r=size(lambda i, o, r: r * (i + o)), **common),
        "DoRA": lambda: LoraConfig(r=size(lambda i, o, r: r * (i + o) + o), use_dora=True, **common),
        "MiSS": lambda: MissConfig(r=size(lambda i, o, r: r * o), **common),
        "SHiRA": lambda: ShiraConfig(r=size(lambda i, o, r: r * (i + o)), **common),
        "C3A": lambda: C3AConfig(
            block_size=size(lambda i, o, b: i * o // b, lambda i, o, b: i % b == 0 and o % b == 0), **common
        ),
        "OFT": lambda: OFTConfig(
            r=0,
            oft_block_size=size(lambda i, o, b: i // b * (b * (b - 1) // 2), lambda i, o, b: i % b == 0 and b > 1),
            **common,
        ),
    }
    return get_peft_model(model, configs[name]()).train()


METHODS = (FROZEN, IN_PLACE, BESIDE, "LoRA", "DoRA", "MiSS", "SHiRA", "C3A", "OFT", "loralib", "einsum")
