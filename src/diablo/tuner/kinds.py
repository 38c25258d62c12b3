"""The adapted layers: one class for each way in which a module computes with its weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout, Layout
from diablo.ops import add_to_diagonal, block_diagonal_conv, block_diagonal_embedding, block_diagonal_linear
from diablo.ops.adapted_linear import AdaptedLinear, lowered
from diablo.ops.weight import trained_diagonal
from diablo.tuner.config import DiabloConfig
from diablo.tuner.holding import HoldingLayer
from diablo.tuner.in_place import compiled_linear, has_hooks, module_obstacle, parameter_obstacle
from diablo.tuner.layer import DiabloLayer
from diablo.tuner.passes import Pass
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

    def _run(
        self, names: tuple[str, ...], adapter_names: list[str] | None, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output, in its dtype, plus the products with the blocks.

        The blocks are stored in fp32 where PEFT is left to its default, and cast for the product; activations are not.

        Raises:
            ValueError: ``adapter_names`` has not one name for each row, or is given while adapters are merged.
        """
        rows = self._rows(adapter_names)
        if rows is not None:
            self._check_rows(x, rows)
        if self.merged_adapters or not (rows or names):
            return self.base_layer(x, *args, **kwargs)
        return self._run_beside(x, partial(self._add_updates, names, rows), *args, **kwargs)

    def _run_beside(
        self, x: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output with the updates added, given the input and that output, which is overwritten."""
        return add(x, self._result(self.base_layer(x, *args, **kwargs)))

    def _add_updates(
        self, names: tuple[str, ...], adapter_names: list[str] | None, x: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        if x.is_floating_point():
            # Under autocast the base layer lowers its input by itself; the blocks follow it.
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


class DiabloLinear(_ModuleLayer, HoldingLayer):
    """An ``nn.Linear`` or ``Conv1D`` with DiaBlo adapters: ``y = base(x) + x * blockdiag(blocks)``.

    The forward takes ``(..., in_features)`` and gives ``(..., out_features)``. Where a pass has the blocks in the
    weight, it computes the one product of the base layer; the backward adds the gradient of the blocks, 1/N of one.
    """

    def _take_number(self) -> None:
        super()._take_number()
        # For the operator of compiled graphs: the compiler would specialise on an integer, and compile each layer of a
        # model anew where they are compiled one by one.
        self._number = torch.tensor(self.number, device="cpu")

    def obstacle(self) -> str | None:
        """Why the blocks have to stand beside the weight; None where they can be written into it."""
        return module_obstacle(self.base_layer)

    def _part(self, names: tuple[str, ...], is_beside: bool) -> AdaptedLinear | None:
        if any(isinstance(self.diablo_dropout[name], nn.Dropout) for name in names):
            return None
        blocks = [self.diablo_blocks[name] for name in names]
        layouts = [self.diablo_layout[name] for name in names]
        bias: Any = self.base_layer.bias
        return AdaptedLinear(self._weight("weight"), bias, blocks, layouts, is_beside, self._is_trained(names))

    def _block_tables(self, names: tuple[str, ...]) -> list[tuple[dict[str, Any], str]]:
        return [(self.diablo_blocks._parameters, name) for name in names]

    def _run_part(self, current: Pass, part: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return part(x, current.reach)

    def _run_compiled(
        self, adapter_names: list[str] | None, x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        base_layer: Any = self.base_layer
        names = self.names_in_use()
        if adapter_names is not None or not self._holds(names, self._obstacle_in_graph()):
            return self._run(names, adapter_names, x, *args, **kwargs)
        blocks = [self.diablo_blocks[name] for name in names]
        lower, bias = lowered(x), base_layer.bias
        if lower is not None:
            x, bias = x.to(lower), None if bias is None else bias.to(lower)
        counts = [self.diablo_layout[name].num_blocks for name in names]
        sizes = (self.in_features, self.out_features)
        return compiled_linear(x, bias, blocks, self._number, ".".join(names), counts, *sizes, lower)

    def _obstacle_in_graph(self) -> str | None:
        """What the compiler can see of obstacles; the operator looks for the others when it runs."""
        if not self._can_hold or self.base_layer.weight.requires_grad:
            return "its weight was trained, tied, sharded or replaced"
        return "hooks are registered on the layer" if has_hooks(self.base_layer) else None

    @contextmanager
    def in_weight(self, adapter_names: tuple[str, ...]) -> Iterator[torch.Tensor]:
        """For the operators of compiled graphs: the weight with the blocks of these adapters in it, as they are now.

        It is that of the pass that runs, or of one of its own.

        Raises:
            RuntimeError: the blocks can no longer be written into the weight.
        """
        written = self.passes.written
        if written is not None and self.number in written.held and written.names[self.number] == adapter_names:
            yield written.parts[self.number].weight
            return
        plan = self.passes.plan([self], adapter_names)
        plan.check_unmerged()
        if self.number not in plan.held:
            reason = self._obstacle_now() or "no adapter of it is trained"
            raise RuntimeError(
                f"A graph was compiled with the blocks of {', '.join(adapter_names)} in the weight of a "
                f"{type(self.base_layer).__name__}, where they cannot be any longer: {reason}. Compile anew after "
                "torch.compiler.reset()."
            )
        with Pass(self.passes, plan):
            yield plan.parts[self.number].weight

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        x = self._dropped(x, adapter_name)
        return block_diagonal_linear(x, self._blocks_to_add(adapter_name), self.diablo_layout[adapter_name], result)

    def _dropped(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return self.diablo_dropout[adapter_name](x)

    def _blocks_to_add(self, adapter_name: str) -> torch.Tensor:
        """The blocks that this process multiplies with."""
        return self.diablo_blocks[adapter_name]

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


class DiabloParameters(HoldingLayer):
    """A module some of whose parameters have DiaBlo adapters, such as the fused experts of a mixture.

    What such a module does with its parameters is its own affair. While blocks are trained they are written into the
    parameters, and the module is run with these; otherwise it is run with copies that have the blocks added, one copy
    of each adapted parameter in each forward. Either way the backward makes the gradient of the whole parameter, of
    which the diagonal is kept. A parameter of ``(experts, out, in)`` has blocks of its own for each expert.

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

    def layouts_of(self, adapter_name: str) -> dict[str, Layout]:
        """An adapter's layouts by the name of the parameter that they belong to."""
        return dict(self.diablo_layout.get(adapter_name, {}))

    def _add_blocks(
        self, adapter_name: str, blocks: Mapping[str, nn.Parameter], layouts: Mapping[str, BlockLayout]
    ) -> None:
        self.diablo_blocks[adapter_name] = nn.ParameterDict(blocks)
        self.diablo_layout[adapter_name] = dict(layouts)

    def _run(self, names: tuple[str, ...], adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with the blocks added to copies of its parameters.

        Raises:
            ValueError: ``adapter_names`` differ, or are given while adapters are merged.
        """
        rows = self._rows(adapter_names)
        if rows is not None:
            if len(set(rows)) > 1:
                raise ValueError(
                    f"adapter_names has {', '.join(sorted(set(rows)))}; adapted parameters "
                    f"({', '.join(self.weights)}) are used for the tokens of all rows together: give one name for all."
                )
            self._check_unmerged()
            names = tuple(rows[:1])
        if self.merged_adapters or not names:
            return self.base_layer(*args, **kwargs)
        changed: dict[str, torch.Tensor] = {}
        for adapter_name in names:
            layouts = self.layouts_of(adapter_name)
            for name, blocks in self.blocks_of(adapter_name).items():
                weight = self.weights[name]
                base: Any = changed.get(name, self.get_base_layer()._parameters[name])
                changed[name] = weight.original(add_to_diagonal(weight.matrix(base), blocks, layouts[name]))
        return functional_call(self.base_layer, changed, args, kwargs)

    def obstacle(self) -> str | None:
        """Why the blocks have to stand beside the parameters; None where they can be written into them."""
        reasons = (parameter_obstacle(self.get_base_layer(), name) for name in self.weights)
        return next((reason for reason in reasons if reason is not None), None)

    def _hooks(self) -> list[Mapping[int, Any]]:
        # The module is called, and its hooks with it.
        return []

    def _block_tables(self, names: tuple[str, ...]) -> list[tuple[dict[str, Any], str]]:
        return [(self.diablo_blocks[name]._parameters, weight) for name in names for weight in self.layouts_of(name)]

    def _run_compiled(self, adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        # The compiler cannot see when the module's backward reads its parameters: a graph makes copies of them, but
        # where a pass around it has the blocks in them, or has to have.
        written = self.passes.written
        is_asked_for = any(self.diablo_in_place[name] is True for name in self.names_in_use())
        if adapter_names is None and (is_asked_for or (written is not None and self.number in written.held)):
            return self._run_outside_of_graph(*args, **kwargs)
        return super()._run_compiled(adapter_names, *args, **kwargs)

    @torch.compiler.disable
    def _run_outside_of_graph(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def _part(self, names: tuple[str, ...], is_beside: bool) -> dict[str, tuple[Any, ...]] | None:
        if is_beside:
            return None
        parts = {}
        for name in self.weights:
            own = [adapter for adapter in names if name in self.layouts_of(adapter)]
            blocks: list[torch.Tensor] = [self.blocks_of(adapter)[name] for adapter in own]
            parts[name] = self._weight(name), blocks, [self.layouts_of(adapter)[name] for adapter in own]
        return parts

    def _run_part(self, current: Pass, part: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = {name: self.weights[name].original(trained_diagonal(*own)) for name, own in part.items()}
        with _Readers(current, [own[0] for own in part.values()]):
            return functional_call(self.base_layer, parameters, args, kwargs)


class _Readers(TorchFunctionMode):
    """Sees to it that the blocks stand in weights whenever a backward reads these, wherever it comes from.

    Args:
        current: the pass that runs.
        weights: the weights.
    """

    def __init__(self, current: Pass, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self._current = current
        self._storages = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        if any(own.layout is torch.strided and own.untyped_storage()._cdata in self._storages for own in given):
            self._current.mark(result, self._reach)
        return result

    def _reach(self) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Second derivatives cannot be had through parameters that are adapted in place, such as fused experts: "
                "set in_place=False."
            )
        self._current.reach()


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
