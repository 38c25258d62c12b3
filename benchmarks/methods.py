"""The compared methods, each from its own library, with as many trained parameters as DiaBlo or nearly as many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import C3AConfig, LoraConfig, MissConfig, OFTConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

import diablo
from diablo.recipes.applying import nearest_size

IN_PLACE, BESIDE, FROZEN = "DiaBlo in place", "DiaBlo beside", "frozen"


class PlainBlocks(nn.Module):
    """The paper's formula (arXiv 2506.03230, section 3) with einsum: what one would write without this package."""

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
    import loralib  # pyrefly: ignore[missing-import]

    rank = equal_size(lambda r: LoraConfig(r=r), model, targets, num_blocks)
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


def target_shapes(model: nn.Module, targets: list[str]) -> Counter[tuple[int, int]]:
    """The number of target layers of each shape ``(in_features, out_features)``."""
    return Counter(
        (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets
    )


def equal_size(
    config: Callable[[int], PeftConfig],
    model: nn.Module,
    targets: list[str],
    num_blocks: int,
    allowed: Callable[[int, int, int], bool] = lambda i, o, size: True,
) -> int:
    """The size of a method (such as a rank) at which its number of trained parameters comes closest to DiaBlo's.

    Args:
        config: makes PEFT's configuration of the method from a size.
        model: the model, without an adapter.
        targets: names of the linear layers to adapt.
        num_blocks: DiaBlo's N.
        allowed: takes a layer's inputs and outputs and a size, and says whether the layer can have that size.
    """
    shapes = target_shapes(model, targets)
    wanted = sum(diablo.BlockLayout(*shape, num_blocks).num_parameters * count for shape, count in shapes.items())
    most = min(map(min, shapes))
    sizes = [size for size in range(1, most + 1) if all(allowed(*shape, size) for shape in shapes)]
    return nearest_size(config, shapes, wanted, sizes)


def build(name: str, model: nn.Module, targets: list[str], num_blocks: int) -> Any:
    """Apply a method to a model, and put the model in training mode.

    Args:
        name: one of ``METHODS``.
        model: the model; it is changed.
        targets: names of the linear layers to adapt.
        num_blocks: DiaBlo's N, which sets the number of parameters for all methods.
    """

    def config(make: Callable[..., PeftConfig], *allowed: Callable[[int, int, int], bool]) -> PeftConfig:
        key = (name, frozenset(target_shapes(model, targets).items()), num_blocks)
        if key not in _SIZES:
            _SIZES[key] = equal_size(make, model, targets, num_blocks, *allowed)
        return make(_SIZES[key], target_modules=targets)

    if name == FROZEN:
        return model.requires_grad_(False).train()
    if name == "einsum":
        return _plain(model, targets, num_blocks).train()
    if name == "loralib":
        return _loralib(model, targets, num_blocks).train()
    configs: dict[str, Callable[[], PeftConfig]] = {
        IN_PLACE: lambda: diablo.DiabloConfig(num_blocks=num_blocks, in_place=True, target_modules=targets),
        BESIDE: lambda: diablo.DiabloConfig(num_blocks=num_blocks, in_place=False, target_modules=targets),
        "LoRA": lambda: config(lambda r, **common: LoraConfig(r=r, **common)),
        "DoRA": lambda: config(lambda r, **common: LoraConfig(r=r, use_dora=True, **common)),
        "MiSS": lambda: config(lambda r, **common: MissConfig(r=r, **common)),
        # SHiRA with rank r trains as many values as LoRA with rank r, so LoRA's rank is taken. SHiRA itself cannot be
        # tried out on the meta device: the operations by which it picks its values do not exist there.
        "SHiRA": lambda: ShiraConfig(
            r=equal_size(lambda r: LoraConfig(r=r), model, targets, num_blocks), target_modules=targets
        ),
        "C3A": lambda: config(
            lambda b, **common: C3AConfig(block_size=b, **common), lambda i, o, b: i % b == 0 and o % b == 0
        ),
        "OFT": lambda: config(
            lambda b, **common: OFTConfig(r=0, oft_block_size=b, **common), lambda i, o, b: i % b == 0 and b > 1
        ),
    }
    return get_peft_model(model, configs[name]()).train()


# The sizes that were found. Finding one takes longer than adapting a model, and some benchmarks adapt a model often.
_SIZES: dict[tuple[str, frozenset[tuple[tuple[int, int], int]], int], int] = {}

METHODS = (FROZEN, IN_PLACE, BESIDE, "LoRA", "DoRA", "MiSS", "SHiRA", "C3A", "OFT", "loralib", "einsum")
