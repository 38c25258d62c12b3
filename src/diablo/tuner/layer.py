"""The tuner layer: a linear layer with trainable diagonal blocks beside or merged into its weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout
from diablo.ops import block_diagonal_linear
from diablo.tuner.config import DiabloConfig
from diablo.tuner.targets import linear_shape


class DiabloLayer(BaseTunerLayer):
    """What a layer keeps for each adapter, by the adapter's name.

    Attributes:
        diablo_blocks: the parameters, each ``(N, d_in, d_out)`` as its layout says.
        diablo_dropout: dropout on the input of the blocks.
        diablo_layout: the geometry.
    """

    adapter_layer_names: tuple[str, ...] = ("diablo_blocks",)
    other_param_names: tuple[str, ...] = ("diablo_dropout", "diablo_layout")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.diablo_blocks = nn.ParameterDict({})
        self.diablo_dropout = nn.ModuleDict({})
        self.diablo_layout: dict[str, BlockLayout] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        # The base weight's own diagonal, kept while adapters are merged into it: 1/N of the weight for each layout.
        self._pristine: dict[BlockLayout, list[torch.Tensor]] = {}

    def update_layer(
        self, adapter_name: str, layout: BlockLayout, config: DiabloConfig, inference_mode: bool = False
    ) -> None:
        """Add an adapter, or replace one of the same name.

        Args:
            adapter_name: name of the adapter.
            layout: geometry of its blocks.
            config: its settings.
            inference_mode: whether the adapter starts frozen.
        """
        self.diablo_layout[adapter_name] = layout
        dropout = nn.Dropout(config.diablo_dropout) if config.diablo_dropout else nn.Identity()
        self.diablo_dropout[adapter_name] = dropout
        self.diablo_blocks[adapter_name] = nn.Parameter(torch.zeros(layout.blocks_shape))
        if not config.init_weights:
            nn.init.normal_(self.diablo_blocks[adapter_name], std=0.02)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)


class DiabloLinear(nn.Module, DiabloLayer):
    """An ``nn.Linear`` or ``Conv1D`` with DiaBlo adapters: ``y = base(x) + x * blockdiag(blocks)``.

    The forward takes ``(..., in_features)`` and gives ``(..., out_features)`` in the dtype that the base layer gives.
    The blocks are stored in fp32 where PEFT is left to its default, and cast for the product; activations are not.

    Args:
        base_layer: the layer to adapt, frozen by PEFT.
        adapter_name: name of its first adapter.
        layout: geometry of that adapter's blocks.
        config: that adapter's settings.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, layout: BlockLayout, config: DiabloConfig) -> None:
        super().__init__()
        DiabloLayer.__init__(self, base_layer)
        shape = linear_shape(self.get_base_layer())
        if shape is None:
            raise TypeError(f"DiaBlo cannot adapt a {type(self.get_base_layer()).__name__}.")
        self.in_features, self.out_features = shape
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, layout, config, inference_mode=config.inference_mode)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output plus the product with the blocks of the active adapters.

        Args:
            x: ``(..., in_features)``.
            args: what else the base layer takes.
            adapter_names: for each row of ``x`` (its first dimension) the adapter to use in place of the active ones,
                or ``"__base__"`` for none.
            kwargs: what else the base layer takes.

        Raises:
            ValueError: ``adapter_names`` has not one name for each row, or is given while adapters are merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            self._check_rows(x, adapter_names)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        # Under autocast the base layer lowers its input by itself; the blocks follow it.
        x = x.to(result.dtype)
        if adapter_names is None:
            for adapter_name in self.active_adapters:
                if adapter_name in self.diablo_blocks:
                    result = self._add_update(x, adapter_name, result)
            return result
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name in self.diablo_blocks:
                rows = [row for row, name in enumerate(adapter_names) if name == adapter_name]
                result[rows] = self._add_update(x[rows], adapter_name, result[rows])
        return result

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        """Add one adapter's product to ``result``, which is overwritten."""
        dropped = self.diablo_dropout[adapter_name](x)
        return block_diagonal_linear(
            dropped, self.diablo_blocks[adapter_name], self.diablo_layout[adapter_name], result
        )

    def _check_rows(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} names and the layer's input {len(x)} rows: give one name for "
                "each row of the batch; layers that see the tokens of all rows in one dimension cannot tell them apart."
            )
        if self.merged:
            raise ValueError(
                f"adapter_names cannot be given while {', '.join(self.merged_adapters)} is merged; "
                "call unmerge_adapter() first."
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add blocks to the base weight's diagonal; only 1/N of the weight is touched.

        The sum is formed in fp32, or in the weight's dtype where that is wider, from the pristine diagonal, and rounded
        to the weight's dtype once for each layout: adapters of equal layouts are summed before they are added.

        Args:
            safe_merge: refuse blocks that would put a NaN or an infinity into the weight, and leave it untouched.
            adapter_names: adapters to merge; the active ones where None.

        Raises:
            ValueError: ``safe_merge`` found a value that is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.diablo_blocks]
        if not names:
            return
        already_merged = self.merged_adapters
        if already_merged:
            self._restore()
        try:
            self._write(already_merged + names, safe_merge)
        except ValueError:
            if already_merged:
                self._write(already_merged, safe_merge=False)
            raise

    def unmerge(self) -> None:
        """Put the base weight back as it was before any merge, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore()

    def refresh_merge(self) -> None:
        """Rewrite a merged weight's diagonal after the blocks of a merged adapter have changed."""
        if self.merged:
            names = self.merged_adapters
            self._restore()
            self._write(names, safe_merge=False)

    def unmerge_one(self, adapter_name: str) -> None:
        """Take one merged adapter out of the weight, which becomes what it would be without it, to the bit."""
        others = [name for name in self.merged_adapters if name != adapter_name]
        self._restore()
        if others:
            self._write(others, safe_merge=False)

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's update as a dense matrix of the base weight's shape, in the dtype of the blocks.

        Merging does not need it; it serves conversion and inspection.

        Raises:
            ValueError: the layer has no adapter of that name.
        """
        if adapter_name not in self.diablo_blocks:
            raise ValueError(f"This layer has no adapter {adapter_name!r}; it has {', '.join(self.diablo_blocks)}.")
        weight, blocks = self._weight, self.diablo_blocks[adapter_name].detach()
        delta = torch.zeros(weight.shape, dtype=blocks.dtype, device=blocks.device)
        for tile in self.diablo_layout[adapter_name].tiles:
            tile.of_weight(delta).copy_(tile.of_blocks(blocks))
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is added to the weight."""
        return True

    def __repr__(self) -> str:
        return "diablo." + super().__repr__()

    def extra_repr(self) -> str:
        """Each adapter's name and the shape of its blocks."""
        return ", ".join(f"{name}: {layout.blocks_shape}" for name, layout in self.diablo_layout.items())

    @property
    def _weight(self) -> torch.Tensor:
        """The base weight as ``(out_features, in_features)``, a view that writes through."""
        base_layer: Any = self.get_base_layer()
        return base_layer.weight.data.T if isinstance(base_layer, Conv1D) else base_layer.weight.data

    @torch.no_grad()
    def _write(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Merge adapters into the pristine weight."""
        pristine = {
            layout: [tile.of_weight(self._weight).clone() for tile in layout.tiles]
            for layout in dict.fromkeys(self.diablo_layout[name] for name in adapter_names)
        }
        self._pristine, self.merged_adapters = pristine, list(adapter_names)
        # A float64 weight must not lose half of its digits on the way.
        wide = torch.promote_types(self._weight.dtype, torch.float32)
        for layout in pristine:
            blocks = sum(
                self.diablo_blocks[name].to(wide) for name in adapter_names if self.diablo_layout[name] == layout
            )
            for tile in layout.tiles:
                view = tile.of_weight(self._weight)
                merged = (view.to(wide) + tile.of_blocks(blocks).to(view.device)).to(view.dtype)
                if safe_merge and not torch.isfinite(merged).all():
                    self._restore()
                    raise ValueError(
                        f"Merging {', '.join(adapter_names)} would put NaN or infinite values into the weight, "
                        "which is left untouched: the adapter is broken, or its blocks overflow the weight's dtype."
                    )
                view.copy_(merged)

    @torch.no_grad()
    def _restore(self) -> None:
        """Write the pristine diagonals back. Those of different layouts overlap, and agree where they do."""
        for layout, diagonal in self._pristine.items():
            for tile, values in zip(layout.tiles, diagonal, strict=True):
                tile.of_weight(self._weight).copy_(values)
        self._pristine, self.merged_adapters = {}, []
