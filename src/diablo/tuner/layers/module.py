"""Modules that are adapted by their one weight, with the blocks beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from diablo.layout import BlockLayout
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.weights import module_weight


class ModuleLayer(DiabloLayer):
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
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, {"weight": layout}, config, inference_mode=config.inference_mode)

    @property
    def in_features(self) -> int:
        """Length of the input: channels for a convolution, the vocabulary for an embedding."""
        return self.weights["weight"].in_features

    @property
    def out_features(self) -> int:
        """Length of the output."""
        return self.weights["weight"].out_features

    def _run(
        self, names: tuple[str, ...], adapter_names: list[str] | None, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output, in its dtype, plus the products with the blocks.

        By PEFT's default the blocks are stored in fp32. They are cast for the product, and activations are not.

        Raises:
            ValueError: ``adapter_names`` does not have one name for each row, or is given while adapters are merged.
        """
        rows = self._rows(adapter_names)
        if rows is not None:
            self._check_rows(x, rows)
        names = self._not_merged(names)
        if not (rows or names):
            return self.base_layer(x, *args, **kwargs)
        return self._run_beside(x, partial(self._add_updates, names, rows), *args, **kwargs)

    def _run_beside(
        self, x: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output with the updates added.

        ``add`` takes the input and that output, which it overwrites.
        """
        return add(x, self._result(self.base_layer(x, *args, **kwargs)))

    def _add_updates(
        self, names: tuple[str, ...], adapter_names: list[str] | None, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        if x.is_floating_point():
            # Under autocast the base layer casts its input to a lower precision by itself. The blocks follow it.
            x = x.to(result.dtype)
        if adapter_names is None:
            for adapter_name in names:
                result = self._add_update(x, adapter_name, result)
            return result
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name in self.diablo_blocks:
                rows = [row for row, name in enumerate(adapter_names) if name == adapter_name]
                result[rows] = self._add_update(x[rows], adapter_name, result[rows])
        return result

    def _result(self, result: torch.Tensor) -> torch.Tensor:
        """The base layer's output as a tensor that may be written into."""
        return result

    @abstractmethod
    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        """Add one adapter's product to ``result``, which is overwritten."""

    def _check_rows(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} names and the layer's input {len(x)} rows: give one name for "
                "each row of the batch; layers that see the tokens of all rows in one dimension cannot tell them apart."
            )
        self._check_unmerged()
