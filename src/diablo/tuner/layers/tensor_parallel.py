"""Linear layers that transformers has cut over several processes (tensor parallelism), adapted where they are cut.

In a column-parallel layer each process has some of the outputs, and the blocks that write them. In a row-parallel layer
each process has some of the inputs, and the blocks that read them. It adds their product to its partial sum, which the
frozen layer reduces anyway. So nothing is sent that the frozen layer would not send. The blocks of all processes
together are one parameter, a ``DTensor``, so that the gradient norm is that of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn

from diablo.layout import BlockLayout, LayoutPart
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers.in_place import has_hooks
from diablo.tuner.layers.linear import DiabloLinear
from diablo.tuner.passes import Pass
from diablo.tuner.weights import is_distributed


@dataclass(frozen=True)
class Slices:
    """How a linear layer is cut over processes.

    Attributes:
        style: transformers' tensor-parallel style of the layer, which moves inputs and outputs between processes.
        mesh: the processes, as a ``DeviceMesh`` of one dimension.
        along_inputs: True where each process has some of the inputs, False where it has some of the outputs.
    """

    style: Any
    mesh: Any
    along_inputs: bool

    def parts(self, layout: BlockLayout) -> list[LayoutPart]:
        """The layout of each process's slice, in the order of the mesh."""
        size, count = layout.in_features if self.along_inputs else layout.out_features, self.mesh.size()
        # Torch shards a dimension in this way: all slices have the same length, but the last ones can be shorter or
        # empty.
        length = -(-size // count)
        edges = [min(rank * length, size) for rank in range(count + 1)]
        return layout.cut(list(pairwise(edges)), self.along_inputs)


def slices_of(model: nn.Module, name: str, module: nn.Module) -> Slices | None:
    """How a module of a model is cut over processes; None where it is whole.

    Args:
        model: the model. transformers has cut modules of it where it was loaded with a ``DistributedConfig``.
        name: the module's name in the model.
        module: the module itself. A tuner layer may have its place in the model already.

    Raises:
        TypeError: the module cannot be adapted, because of how it is cut. The message is the reason; the caller puts
            the module's name before it.
    """
    weight = module._parameters.get("weight")
    of_transformers: Any = model
    plan: Mapping[str, str] = getattr(of_transformers, "tp_plan", None) or {}
    in_parallel = (getattr(of_transformers, "_tp_size", None) or 1) > 1
    chosen = plan.get(_with_wildcards(name)) if in_parallel else None
    if chosen == "replicate":
        # In this style every process has the whole layer, and nothing is moved.
        return None
    if not is_distributed(weight):
        if chosen is not None:
            raise TypeError(f"a {type(module).__name__} in the tensor-parallel style {chosen!r}")
        return None
    if chosen is None:
        raise TypeError(
            f"a {type(module).__name__} whose weight is sharded: give it the adapter before fully_shard, or load the "
            "model with a DistributedConfig of transformers"
        )
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, ColwiseParallel, RowwiseParallel

    style = ALL_PARALLEL_STYLES[chosen]
    mesh: Any = weight.device_mesh  # pyrefly: ignore[missing-attribute]
    if type(style) not in (ColwiseParallel, RowwiseParallel) or type(module).forward is not nn.Linear.forward:
        raise TypeError(f"a {type(module).__name__} in the tensor-parallel style {chosen!r}")
    if mesh.ndim != 1:
        raise TypeError(f"a {type(module).__name__} that is cut along {mesh.ndim} dimensions of processes")
    return Slices(style, mesh, type(style) is RowwiseParallel)


def slice_obstacle(module: nn.Module) -> str | None:
    """Why blocks have to stand beside a process's slice of a weight; None where they can be written into it."""
    return "hooks are registered on the layer" if has_hooks(module) else None


def _with_wildcards(name: str) -> str:
    """The name as transformers' plans write it, with a star in place of each number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_saved_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse ``modules_to_save`` that are cut over processes.

    PEFT trains copies of such modules, and transformers would go on calling the originals.

    Args:
        model: the model.
        names: the names in ``modules_to_save``.

    Raises:
        ValueError: one of these modules is cut.
    """
    for name, module in model.named_modules():
        # As PEFT matches them.
        if name.endswith(tuple(names)) and any(is_distributed(parameter) for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save has {name}, which is cut over processes: its copy would not be called, and nothing "
                "trained; adapt it as one of the target_modules, or leave it out."
            )


class DiabloParallelLinear(DiabloLinear):
    """A linear layer that is cut over processes. Each process has a slice of the weight and of the blocks.

    Files have the blocks of the whole matrix. So every process has to call ``save_pretrained``, with
    ``is_main_process=True`` on the one that writes.

    Args:
        base_layer: the layer to adapt, frozen by PEFT.
        adapter_name: name of its first adapter.
        layout: layout of that adapter's blocks in the whole matrix.
        config: that adapter's settings.
        slices: how the layer is cut.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layout: BlockLayout, config: DiabloConfig, slices: Slices
    ) -> None:
        # This comes first: the parent's constructor adds the adapter, and `update_layer` needs the slices.
        self.slices = slices
        super().__init__(base_layer, adapter_name, layout, config)
        self._register_state_dict_hook(_gather_blocks)

    def update_layer(
        self,
        adapter_name: str,
        layouts: Mapping[str, Any],
        config: DiabloConfig,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter, or replace one of the same name.

        Args:
            adapter_name: name of the adapter.
            layouts: layouts of its blocks in the whole matrices, by the name of the weight.
            config: its settings.
            inference_mode: whether the adapter starts frozen.
        """
        rank = self.slices.mesh.get_local_rank()
        parts = {name: self.slices.parts(layout)[rank] for name, layout in layouts.items()}
        super().update_layer(adapter_name, parts, config, inference_mode)

    def settle(self, is_shared: bool) -> None:
        """Join the blocks of all processes to one parameter, and find out whether they can stand in the weight."""
        for name, blocks in self.diablo_blocks.items():
            if not is_distributed(blocks):
                whole = nn.Parameter(self._distributed(blocks.detach()), blocks.requires_grad)
                # The parameter is put into the table directly: where accelerate makes empty parameters, it replaces the
                # registration by one that cannot copy a DTensor.
                self.diablo_blocks._parameters[name] = whole
        super().settle(is_shared)

    def obstacle(self) -> str | None:
        """Why the blocks have to stand beside the weight; None where they can be written into it."""
        return slice_obstacle(self.base_layer)

    @torch.compiler.disable
    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The base layer's output, with the blocks of the active adapters. It runs outside of compiled graphs.

        Raises:
            RuntimeError: hooks are registered on the base layer. They would not be called.
        """
        if has_hooks(self.base_layer):
            raise RuntimeError(
                "Hooks are registered on a linear layer that is cut over processes and adapted, and such a layer does "
                "not call them: register them on the module that holds it."
            )
        return super().forward(*args, adapter_names=adapter_names, **kwargs)

    def _run_beside(
        self, x: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        base_layer: Any = self.base_layer
        return self._on_slice(x, lambda x, bias: add(x, F.linear(x, base_layer.weight.to_local(), bias)))

    def _run_part(self, current: Pass, part: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = [blocks.to_local() for blocks in part.blocks]
        return self._on_slice(x, lambda x, bias: part.with_others(bias, own)(x, current.reach))

    def _on_slice(
        self, x: torch.Tensor, compute: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    ) -> torch.Tensor:
        """Compute with this process's slice. The style prepares the input before, and the output afterwards.

        Args:
            x: the layer's input, as the model gives it.
            compute: computes the slice's output from the slice's input and bias.
        """
        from torch.distributed.tensor import DTensor, Partial

        style, mesh, along_inputs = self.slices.style, self.slices.mesh, self.slices.along_inputs
        base_layer: Any = self.base_layer
        (x,), _ = style.transform_inputs_pre_forward(base_layer, (x,), {}, mesh)
        if isinstance(x, DTensor):
            # Where the outputs are cut, each process has the gradient of the whole input from some of the outputs only.
            # Such gradients are parts of a sum.
            x = x.to_local(grad_placements=None if along_inputs else [Partial()])
        bias = base_layer.bias
        y: Any = compute(x, None if bias is None or along_inputs else bias.to_local())
        if along_inputs and bias is not None and y.requires_grad:
            # With gradients, the style adds no bias: it expects that the product of DTensors has added it. So it is
            # added here.
            y = DTensor.from_local(y, mesh, [Partial()], run_check=False)
            y = y.redistribute(placements=[style.output_layouts]) + bias.to(y.dtype)
        return style.transform_output_post_forward(base_layer, y, mesh)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: to convert an adapter, load it into a model that is not cut over processes."""
        return False

    def _dropped(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        dropout: Any = self.diablo_dropout[adapter_name]
        if not self.slices.along_inputs or not isinstance(dropout, nn.Dropout) or not dropout.training:
            return super()._dropped(x, adapter_name)
        # Each process draws the mask for the whole input. So the processes' random generators stay equal, and the mask
        # is the same as in one process.
        part = self.diablo_layout[adapter_name]
        mask = dropout(x.new_ones(*x.shape[:-1], part.whole.in_features))
        return x * mask[..., slice(*part.inputs)]

    def _are_finite(self, weights: Mapping[str, torch.Tensor]) -> bool:
        # Either all processes merge or none does.
        finite = torch.tensor(super()._are_finite(weights), dtype=torch.int, device=self._weight("weight").device)
        distributed.all_reduce(finite, distributed.ReduceOp.MIN, group=self.slices.mesh.get_group())
        return bool(finite)

    def _blocks_to_add(self, adapter_name: str) -> torch.Tensor:
        return self.diablo_blocks[adapter_name].to_local()

    def _values_of(self, adapter_name: str) -> dict[str, torch.Tensor]:
        return {name: self._stored(blocks) for name, blocks in self.blocks_of(adapter_name).items()}

    def _new_blocks(self, weight_name: str, layout: Any, config: DiabloConfig) -> nn.Parameter:
        whole = super()._new_blocks(weight_name, layout.whole, config)
        return nn.Parameter(layout.taken_from(whole.detach()))

    def _distributed(self, blocks: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(blocks, self.slices.mesh, [Shard(0)], run_check=False)

    def _stored(self, parameter: Any) -> torch.Tensor:
        return parameter.detach().to_local()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # pyrefly: ignore[bad-override]
        for name, part in self.diablo_layout.items():
            key = f"{prefix}diablo_blocks.{name}"
            given = state_dict.get(key)
            if given is None:
                continue
            if is_distributed(given):
                if given.shape == self.diablo_blocks[name].shape:
                    # PEFT and torch have cut the blocks of all processes along their first dimension already.
                    continue
                # PEFT takes a whole parameter for a slice where both have the same shape.
                is_whole = tuple(given.shape) == part.whole.blocks_shape
                given = given.full_tensor() if is_whole else given.to_local()
            if tuple(given.shape) == part.whole.blocks_shape:
                state_dict[key] = self._distributed(part.taken_from(given).to(self._weight("weight").device))
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_whole(model: nn.Module, what: str) -> None:
    """Refuse a model that has adapted layers which are cut over processes.

    Args:
        model: the model.
        what: the action that is refused, as the start of the message.

    Raises:
        ValueError: a layer is cut.
    """
    name = next((name for name, module in model.named_modules() if isinstance(module, DiabloParallelLinear)), None)
    if name is not None:
        raise ValueError(
            f"{what} needs all blocks in one process, and {name} is cut over processes: save the adapter, and load it "
            "into the model without tensor parallelism."
        )


def _gather_blocks(layer: DiabloParallelLinear, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """In a state dict, replace this process's blocks by those of the whole matrix."""
    for name, part in layer.diablo_layout.items():
        key = f"{prefix}diablo_blocks.{name}"
        blocks: Any = state_dict.get(key)
        if not is_distributed(blocks):
            continue
        gathered = blocks.detach().full_tensor().unflatten(0, (layer.slices.mesh.size(), -1))
        whole = gathered.new_zeros(part.whole.blocks_shape)
        for own, blocks in zip(layer.slices.parts(part.whole), gathered, strict=True):
            own.put_into(whole, blocks)
        state_dict[key] = whole
