"""The adapted layers: one class for each way in which a module computes with its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout
from diablo.ops import add_to_diagonal, block_diagonal_conv, block_diagonal_embedding, block_diagonal_linear
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layer import DiabloLayer
from diablo.tuner.weights import module_weight, parameter_weight


class _ModuleLayer(DiabloLayer):
    """A module that is adapted by its one weight.

    Args:
        base_layer: the layer to adapt, frozen by PEFT.
        adapter_name: name of its first adapter.
        layout: geometry of that adapter's blocks.
        config: that adapter's settings.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, layout: BlockLayout, config: DiabloConfig) -> None:
        weight = module_weight(base_layer)
        super().__init__(base_layer, {"weight": weight})
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, {"weight": layout}, config, inference_mode=config.inference_mode)


class DiabloLinear(_ModuleLayer):
    """An ``nn.Linear`` or ``Conv1D`` with DiaBlo adapters: ``y = base(x) + x * blockdiag(blocks)``.

    The forward takes ``(..., in_features)`` and gives ``(..., out_features)``.
    """

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        dropped = self.diablo_dropout[adapter_name](x)
        return block_diagonal_linear(
            dropped, self.diablo_blocks[adapter_name], self.diablo_layout[adapter_name], result
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is added to the weight."""
        return True


class DiabloConv(_ModuleLayer):
    """An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with blocks over its channels, at each position of its kernel.

    The forward takes ``(batch, in_channels, *size)`` or ``(in_channels, *size)``.
    """

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        base_layer: Any = self.get_base_layer()
        x = self.diablo_dropout[adapter_name](x)
        padding = base_layer.padding
        if base_layer.padding_mode != "zeros":
            x = F.pad(x, base_layer._reversed_padding_repeated_twice, mode=base_layer.padding_mode)
            padding = (0,) * len(base_layer.kernel_size)
        return block_diagonal_conv(
            x,
            self.diablo_blocks[adapter_name],
            self.diablo_layout[adapter_name],
            result,
            stride=base_layer.stride,
            padding=padding,
            dilation=base_layer.dilation,
        )


class DiabloEmbedding(_ModuleLayer):
    """An ``nn.Embedding`` with blocks over the vocabulary and the columns: each token trains the columns of its block.

    The forward takes indices of any shape. Dropout leaves out the update of whole tokens.
    """

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        base_layer: Any = self.get_base_layer()
        factor = self.diablo_dropout[adapter_name](result.new_ones(*x.shape, 1))
        # Gemma's embeddings multiply by a constant after the lookup.
        scale = getattr(base_layer, "embed_scale", None)
        if scale is not None:
            factor = factor * scale
        return block_diagonal_embedding(
            x,
            self.diablo_blocks[adapter_name],
            self.diablo_layout[adapter_name],
            result,
            factor=factor.to(result.dtype),
            padding_idx=base_layer.padding_idx,
            scale_grad_by_freq=base_layer.scale_grad_by_freq,
        )


class DiabloParameters(DiabloLayer):
    """A module some of whose parameters have DiaBlo adapters, such as the fused experts of a mixture.

    What such a module does with its parameters is its own affair, so it is run with copies that have the blocks added:
    each forward makes one copy of each adapted parameter. A parameter of ``(experts, out, in)`` has blocks of its own
    for each expert.

    Args:
        base_layer: the module whose parameters are adapted, frozen by PEFT.
        adapter_name: name of its first adapter.
        layouts: geometry of that adapter's blocks, by the parameter's name.
        config: that adapter's settings.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layouts: Mapping[str, BlockLayout], config: DiabloConfig
    ) -> None:
        super().__init__(base_layer, {name: parameter_weight(base_layer, name) for name in layouts})
        self.diablo_blocks = nn.ModuleDict({})
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, layouts, config, inference_mode=config.inference_mode)

    def update_layer(
        self,
        adapter_name: str,
        layouts: Mapping[str, BlockLayout],
        config: DiabloConfig,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, which may touch other parameters than the ones before it, or replace one."""
        for name in layouts.keys() - self.weights.keys():
            self.weights[name] = parameter_weight(self.get_base_layer(), name)
        super().update_layer(adapter_name, layouts, config, inference_mode)

    def blocks_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """An adapter's blocks by the name of the parameter that they belong to."""
        return dict(self.diablo_blocks[adapter_name].items()) if adapter_name in self.diablo_blocks else {}

    def layouts_of(self, adapter_name: str) -> dict[str, BlockLayout]:
        """An adapter's layouts by the name of the parameter that they belong to."""
        return dict(self.diablo_layout.get(adapter_name, {}))

    def _add_blocks(
        self, adapter_name: str, blocks: Mapping[str, nn.Parameter], layouts: Mapping[str, BlockLayout]
    ) -> None:
        self.diablo_blocks[adapter_name] = nn.ParameterDict(blocks)
        self.diablo_layout[adapter_name] = dict(layouts)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base layer's output with the blocks of the active adapters added to its parameters.

        Args:
            args: what the base layer takes.
            adapter_names: for each row of the batch the adapter to use in place of the active ones; all must be the
                same, since the module sees the tokens of all rows together.
            kwargs: what else the base layer takes.

        Raises:
            ValueError: ``adapter_names`` differ, or are given while adapters are merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self.active_adapters
        if adapter_names is not None and not self.disable_adapters:
            if len(set(adapter_names)) > 1:
                raise ValueError(
                    f"adapter_names has {', '.join(sorted(set(adapter_names)))}; adapted parameters "
                    f"({', '.join(self.weights)}) are used for the tokens of all rows together: give one name for all."
                )
            self._check_unmerged()
            names = adapter_names[:1]
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        changed: dict[str, torch.Tensor] = {}
        for adapter_name in names:
            layouts = self.layouts_of(adapter_name)
            for name, blocks in self.blocks_of(adapter_name).items():
                weight = self.weights[name]
                base: Any = changed.get(name, self.get_base_layer()._parameters[name])
                changed[name] = weight.original(add_to_diagonal(weight.matrix(base), blocks, layouts[name]))
        return functional_call(self.base_layer, changed, args, kwargs)


def adapt_module(module: nn.Module, adapter_name: str, layout: BlockLayout, config: DiabloConfig) -> DiabloLayer:
    """Put the layer around a module that computes as it does.

    Raises:
        TypeError: the module cannot be adapted.
    """
    module_weight(module)
    kinds: tuple[tuple[type[_ModuleLayer], tuple[type[nn.Module], ...]], ...] = (
        (DiabloLinear, (nn.Linear, Conv1D)),
        (DiabloEmbedding, (nn.Embedding,)),
        (DiabloConv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    )
    layer = next(layer for layer, modules in kinds if isinstance(module, modules))
    return layer(module, adapter_name, layout, config)
