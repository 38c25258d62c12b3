"""What every adapted layer has: the blocks of each adapter, and their place in passes."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import nn

from diablo.layout import BlockLayout, Layout
from diablo.tuner.config import DiabloConfig, config_obstacle
from diablo.tuner.layers.diagonal import Diagonals
from diablo.tuner.layers.merging import MergingLayer
from diablo.tuner.layers.offloading import offloading_hook, take_back
from diablo.tuner.passes import Pass, Passes
from diablo.tuner.plans import LAYERS, Watched
from diablo.tuner.weights import Weight, recomputed

_NUMBERS = itertools.count()

# If this were shown, torch's functions would take the adapted layer for the parametrized one, and change attributes
# that it does not have.
_NOT_SHOWN = frozenset({"parametrizations"})


class DiabloLayer(MergingLayer):
    """A module whose weights have DiaBlo adapters.

    This class says what an adapter is, and makes each forward part of a pass. Its base class says how adapters are
    merged. A subclass says how its module computes with the blocks.

    The public attributes that the module has when it is adapted, such as the ``stride`` of a convolution, are read and
    set through this layer. Names that this layer has itself are excepted.

    Args:
        base_layer: the module to adapt, frozen by PEFT.
        weights: how each adapted weight of it is read, by the weight's name in the module.

    Attributes:
        diablo_dropout: dropout on the input of the blocks, by the adapter's name.
        diablo_in_place: by the adapter's name, ``in_place`` of its settings; False if another setting rules it out.
        passes: the passes of the model that the layer belongs to.
        number: its number in ``LAYERS``.
    """

    adapter_layer_names: tuple[str, ...] = ("diablo_blocks",)
    other_param_names: tuple[str, ...] = ("diablo_dropout", "diablo_layout", "diablo_in_place")

    # Names of the base layer's attributes that are read and set through this layer. There are none before the
    # constructor has run.
    _shown: frozenset[str] = frozenset()

    def __init__(self, base_layer: nn.Module, weights: Mapping[str, Weight]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weights = dict(weights)
        self.diablo_blocks: Any = nn.ParameterDict({})
        self.diablo_dropout = nn.ModuleDict({})
        self.diablo_layout: dict[str, Any] = {}
        self.diablo_in_place: dict[str, bool | str] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.diagonals = Diagonals()
        self.passes = Passes()
        self._take_number()
        # Only attributes that it has now are shown. Libraries that prepare every module later (hooks, counters) mean
        # each module by itself.
        public = {name for name in dir(base_layer) if not name.startswith("_")}
        self._shown = frozenset(public.difference(dir(self), _NOT_SHOWN))

    def __getattr__(self, name: str) -> Any:
        # Python calls this for names that it does not find otherwise, among them torch's parameters and modules.
        return getattr(self.base_layer, name) if name in self._shown else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._shown:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def _take_number(self) -> None:
        self.number = next(_NUMBERS)
        LAYERS[self.number] = self

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base layer's output, with the blocks of the active adapters.

        It is part of the running pass, or else a pass of its own.

        Args:
            args: what the base layer takes.
            adapter_names: for each row of the batch, the adapter to use in place of the active ones; ``"__base__"`` is
                none.
            kwargs: what else the base layer takes.

        Raises:
            RuntimeError: ``in_place=True`` has become impossible since the adapter was added. The message says why.
            ValueError: ``adapter_names`` does not fit the rows, or is given while adapters are merged.
        """
        if torch.compiler.is_compiling():
            return self._run_compiled(adapter_names, *args, **kwargs)
        # With few tokens, these lines take a large part of the time. They ask nothing that the pass has settled.
        passes = self.passes
        current = passes.running.get(get_ident())
        if current is not None and current.changes == passes.changes:
            plan = current.plan
            part = plan.parts.get(self.number)
            if part is not None and adapter_names is None:
                return self._run_part(current, part, *args, **kwargs)
            if part is None and (names := plan.names.get(self.number)) is not None:
                return self._run(names, adapter_names, *args, **kwargs)
        with passes.begin([self], (args, kwargs), bare=adapter_names is not None) as current:
            result = self.forward(*args, adapter_names=adapter_names, **kwargs)
            current.mark(result)
        return result

    def _run_compiled(self, adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        """The forward as the compiler traces it. The compiler does not see passes."""
        return self._run(self.names_in_use(), adapter_names, *args, **kwargs)

    def _run_part(self, current: Pass, part: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer that the current pass has prepared, given what :meth:`part` returned."""
        raise AssertionError(f"A {type(self).__name__} has no part in passes.")

    @abstractmethod
    def _run(self, names: tuple[str, ...], adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        """The forward for which the pass has prepared nothing: the base layer computes, and updates are added.

        This is also the forward of a layer with merged adapters. Merged blocks stand in the weight, and the other
        adapters that the pass uses are added beside it.

        Args:
            names: the adapters that the pass uses.
            adapter_names: as :meth:`forward` takes them. If given, they count in place of ``names``.
            args: what the base layer takes.
            kwargs: what else the base layer takes.
        """

    def names_in_use(self) -> tuple[str, ...]:
        """The adapters of this layer that a pass would use now."""
        if self._disable_adapters:
            return ()
        active = self._active_adapter
        if isinstance(active, str):
            return (active,) if active in self.diablo_layout else ()
        return tuple(name for name in active if name in self.diablo_layout)

    def _not_merged(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the adapters that are not merged, and so do not already stand in the weight."""
        merged = self.merged_adapters
        return tuple(name for name in names if name not in merged) if merged else names

    def part(self, names: tuple[str, ...]) -> tuple[Any, bool]:
        """What the layer computes with in a pass of these adapters, and whether their blocks stand in its weights."""
        return None, False

    def diagonals_of(self, names: Sequence[str]) -> list[tuple[torch.Tensor, dict[Layout, list[torch.Tensor]]]]:
        """The weights that a pass writes these adapters' blocks into, each with its blocks by layout."""
        return [(self._weight(name), by_layout) for name, by_layout in self.added(names).items()]

    def watched(self, names: tuple[str, ...]) -> Watched:
        """What the layer's part in a pass with these adapters depends on, besides the choice of adapters."""
        return Watched(self._block_tables(names))

    def _block_tables(self, names: tuple[str, ...]) -> list[tuple[dict[str, Any], str]]:
        """Where torch keeps the blocks of these adapters: a module's table of parameters, and a key of it."""
        return [(self.diablo_blocks._parameters, name) for name in names]

    def take_blocks_back(self) -> None:
        """Bring the blocks back to their device, where accelerate has offloaded them."""
        take_back(self.diablo_blocks)

    def update_layer(
        self,
        adapter_name: str,
        layouts: Mapping[str, BlockLayout],
        config: DiabloConfig,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace one of the same name.

        Args:
            adapter_name: name of the adapter.
            layouts: geometry of its blocks, by the name of the weight.
            config: its settings.
            inference_mode: whether the adapter starts frozen.
        """
        dropout = nn.Dropout(config.diablo_dropout) if config.diablo_dropout else nn.Identity()
        self.diablo_dropout[adapter_name] = dropout
        self.diablo_in_place[adapter_name] = False if config_obstacle(config) else config.in_place
        self._add_blocks(
            adapter_name, {name: self._new_blocks(name, layout, config) for name, layout in layouts.items()}, layouts
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_layouts(self, adapter_name: str, layouts: Mapping[str, Layout]) -> None:
        """Give an adapter other layouts. Its parameters stay the same objects, and their values are unset.

        Args:
            adapter_name: the adapter.
            layouts: the geometry of its blocks, by the name of the weight.
        """
        own = self.blocks_of(adapter_name)
        for name, blocks in own.items():
            blocks.grad = None
            blocks.data = blocks.data.new_empty(layouts[name].blocks_shape)
        self._add_blocks(adapter_name, own, layouts)
        self.passes.forget()

    def _add_blocks(self, adapter_name: str, blocks: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout]) -> None:
        self.diablo_blocks[adapter_name] = blocks["weight"]
        self.diablo_layout[adapter_name] = layouts["weight"]

    def _new_blocks(self, weight_name: str, layout: BlockLayout, config: DiabloConfig) -> nn.Parameter:
        blocks = torch.zeros(layout.blocks_shape)
        if not config.init_weights:
            nn.init.normal_(blocks, std=0.02)
        return nn.Parameter(blocks)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        hook = offloading_hook(self.get_base_layer())
        if device is None and hook is not None:
            # Between forwards the weight is on no device.
            device = torch.device(hook.execution_device)
        # PEFT reads the device from an attribute `weight`, which a module of experts does not have.
        elif device is None and "weight" not in self.weights:
            device = self._weight(next(iter(self.weights))).device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[Any, Any]:
        if recomputed(base_layer) is None:
            return super()._get_base_layer_device_and_dtype(base_layer)
        # Reading the weight changes the state of some norms. And a weight that was computed before the model was moved
        # is on the old device.
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def _rows(self, adapter_names: list[str] | None) -> list[str] | None:
        """The adapters of the rows, if each row has its own; None if adapters are disabled.

        Disabling unmerges what is merged, as in PEFT.
        """
        if not self._disable_adapters:
            return adapter_names
        if self.merged_adapters:
            self.unmerge()
        return None

    def _check_unmerged(self) -> None:
        if self.merged:
            raise ValueError(
                f"adapter_names cannot be given while {', '.join(self.merged_adapters)} is merged; "
                "call unmerge_adapter() first."
            )

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Choose the active adapters. The arguments are those of PEFT's layers."""
        self.passes.changes += 1
        super().set_adapter(*args, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.passes.changes += 1
        super().enable_adapters(enabled)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether LoRA can express the update. False here; True for linear layers."""
        return False

    def __repr__(self) -> str:
        return "diablo." + super().__repr__()

    def extra_repr(self) -> str:
        """Each adapter's name and the shape of its blocks."""
        shown = []
        for adapter_name in self.diablo_layout:
            for name, layout in self.layouts_of(adapter_name).items():
                weight = f".{name}" if name != "weight" else ""
                shown.append(f"{adapter_name}{weight}: {layout.blocks_shape}")
        return ", ".join(shown)

    def _check_base(self) -> None:
        """Refuse to read a weight as the base weight, or to change it, in the middle of a pass."""
        written = self.passes.written
        if written is not None and self.number in written.held:
            raise RuntimeError(
                "A model whose adapters are trained in place cannot be saved, loaded, copied, moved or merged in the "
                "middle of a forward or a backward, which has blocks in the weights: do it before or after."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._check_base()
        # Plans refer to the present weights, and torch does not move a DTensor that others refer to.
        self.passes.forget()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:  # pyrefly: ignore[bad-override]
        # The base layer and the blocks are saved after this.
        self._check_base()
        self.take_blocks_back()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:  # pyrefly: ignore[bad-override]
        self._check_base()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        self._check_base()
        return self.__dict__

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "torch's DataParallel copies a model for every step, so that its adapters would not be trained in place: "
            "use DistributedDataParallel, by torchrun or accelerate launch, or make one GPU visible."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied or unpickled layer is a layer of its own.
        self._take_number()
