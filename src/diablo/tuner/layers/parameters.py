"""Modules whose parameters are adapted by themselves, such as the fused experts of a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diablo.layout import BlockLayout, Layout
from diablo.ops import add_to_diagonal
from diablo.ops.weight import trained_diagonal
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers.holding import HoldingLayer
from diablo.tuner.layers.in_place import parameter_obstacle
from diablo.tuner.layers.offloading import offloading_hook
from diablo.tuner.passes import Pass
from diablo.tuner.weights import parameter_weight


class DiabloParameters(HoldingLayer):
    """A module some of whose parameters have DiaBlo adapters, such as the fused experts of a mixture.

    Such a module may do anything with its parameters. While blocks are trained, they stand in the parameters, and the
    module is run with these. Otherwise it is run with copies that have the blocks added: one copy of each adapted
    parameter in each forward. Either way the backward makes the gradient of the whole parameter, and its diagonal is
    kept. A parameter of ``(experts, out, in)`` has blocks of its own for each expert.

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
        """Add an adapter, or replace one of the same name. It may adapt other parameters than those before it."""
        for name in layouts.keys() - self.weights.keys():
            self.weights[name] = parameter_weight(self.get_base_layer(), name)
        super().update_layer(adapter_name, layouts, config, inference_mode)

    def blocks_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """An adapter's blocks by the name of the parameter that they belong to."""
        return dict(self.diablo_blocks[adapter_name].items()) if adapter_name in self.diablo_blocks else {}

    def layouts_of(self, adapter_name: str) -> dict[str, Layout]:
        """An adapter's layouts by the name of the parameter that they belong to."""
        return dict(self.diablo_layout.get(adapter_name, {}))

    def _add_blocks(self, adapter_name: str, blocks: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout]) -> None:
        self.diablo_blocks[adapter_name] = nn.ParameterDict(blocks)
        self.diablo_layout[adapter_name] = dict(layouts)

    def _run(self, names: tuple[str, ...], adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with the blocks added to copies of its parameters.

        Raises:
            ValueError: ``adapter_names`` has different names, or is given while adapters are merged.
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
        names = self._not_merged(names)
        if not names:
            return self.base_layer(*args, **kwargs)
        if offloading_hook(self.base_layer) is not None:
            return self._run_offloaded(names, *args, **kwargs)
        return functional_call(self.base_layer, self._changed(names), args, kwargs)

    def _run_offloaded(self, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        """Do the same where accelerate fetches the parameters for the forward.

        Its hook would put the fetched parameters in the place of the copies, so the hook is called by hand, around
        them.
        """
        module: Any = self.base_layer
        hooked, hook = module.forward, module._hf_hook
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        module.forward = module._old_forward
        try:
            return hook.post_forward(module, functional_call(module, self._changed(names), args, kwargs))
        finally:
            module.forward = hooked

    def _changed(self, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Copies of the adapted parameters, with the blocks of these adapters added."""
        changed: dict[str, torch.Tensor] = {}
        for adapter_name in names:
            layouts = self.layouts_of(adapter_name)
            for name, blocks in self.blocks_of(adapter_name).items():
                weight = self.weights[name]
                base: Any = changed.get(name, self.get_base_layer()._parameters[name])
                changed[name] = weight.original(add_to_diagonal(weight.matrix(base), blocks, layouts[name]))
        return changed

    def obstacle(self) -> str | None:
        """Why the blocks have to stand beside the parameters; None where they can be written into them."""
        reasons = (parameter_obstacle(self.get_base_layer(), name) for name in self.weights)
        return next((reason for reason in reasons if reason is not None), None)

    def _hooks(self) -> list[Mapping[int, Any]]:
        # The module itself is called, and so are its hooks. They are no obstacle.
        return []

    def _block_tables(self, names: tuple[str, ...]) -> list[tuple[dict[str, Any], str]]:
        return [(self.diablo_blocks[name]._parameters, weight) for name in names for weight in self.layouts_of(name)]

    def _run_compiled(self, adapter_names: list[str] | None, *args: Any, **kwargs: Any) -> Any:
        # The compiler cannot see when the module's backward reads its parameters, so a graph makes copies of them. The
        # exceptions run outside of the graph: a pass around it has the blocks in the parameters, or `in_place=True`
        # asks for that.
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
    """Makes sure that the blocks stand in the weights whenever a backward reads the weights.

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
                "Second derivatives cannot be computed through parameters with blocks in them, such as fused experts: "
                "set in_place=False."
            )
        self._current.reach()
