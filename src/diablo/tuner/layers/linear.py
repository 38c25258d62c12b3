"""Linear layers: the blocks stand in the weight while a pass runs, or beside it, as a product that is added."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diablo.ops import block_diagonal_linear
from diablo.ops.adapted_linear import AdaptedLinear, lowered
from diablo.tuner.layers.holding import HoldingLayer
from diablo.tuner.layers.in_place import compiled_linear, has_hooks, module_obstacle
from diablo.tuner.layers.module import ModuleLayer
from diablo.tuner.passes import Pass


class DiabloLinear(ModuleLayer, HoldingLayer):
    """An ``nn.Linear`` or ``Conv1D`` with DiaBlo adapters: ``y = base(x) + x * blockdiag(blocks)``.

    The forward takes ``(..., in_features)`` and gives ``(..., out_features)``. If a pass has the blocks in the weight,
    the forward computes the one product of the base layer. The backward also computes the gradient of the blocks, 1/N
    of a product.
    """

    def _take_number(self) -> None:
        super()._take_number()
        # The operator of compiled graphs takes the number as a tensor. The compiler would specialise on an integer, and
        # would compile each layer anew where layers are compiled one by one.
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
        """The obstacles that the compiler can see. The operator looks for the others when it runs."""
        if reason := self._merged_obstacle():
            return reason
        if not self._can_hold or self.base_layer.weight.requires_grad:
            return "its weight was trained, tied, sharded or replaced"
        return "hooks are registered on the layer" if has_hooks(self.base_layer) else None

    @contextmanager
    def in_weight(self, adapter_names: tuple[str, ...]) -> Generator[torch.Tensor]:
        """The weight with the present blocks of these adapters in it, for the operators of compiled graphs.

        It is the weight in the running pass, or else in a pass of its own.

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
                f"{type(self.base_layer).__name__}, and they can no longer be written there: {reason}. Call "
                "torch.compiler.reset() and compile again."
            )
        with Pass(self.passes, plan):
            yield plan.parts[self.number].weight

    def _add_update(self, x: torch.Tensor, adapter_name: str, result: torch.Tensor) -> torch.Tensor:
        x = self._dropped(x, adapter_name)
        return block_diagonal_linear(x, self._blocks_to_add(adapter_name), self.diablo_layout[adapter_name], result)

    def _dropped(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return self.diablo_dropout[adapter_name](x)

    def _blocks_to_add(self, adapter_name: str) -> torch.Tensor:
        """The blocks that this process multiplies by."""
        return self.diablo_blocks[adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is a matrix that is added to the weight, which LoRA can express."""
        return True
