"""What training a model would take, from its config alone: trained parameters by kind, and memory by method."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from diablo.errors import UserError
from diablo.layout import BlockLayout
from diablo.methods import TargetKind, apply_method, count_parameters, nearest_size, shapes_of, target_kinds
from diablo.models import load_config, meta_model, resolve_model
from diablo.recipe import DiabloMethod, FullMethod, LoraMethod
from diablo.tuner import DiabloLayer

_ATTENTION = "diablo_sizing"


@dataclass(frozen=True)
class Memory:
    """An estimate of the memory of training by one method, in bytes.

    Attributes:
        method: the method, in words.
        trained: trained parameters.
        weights: the model's weights.
        adapter: the adapter's parameters and, for DiaBlo, the base values of the diagonals.
        gradients: of the trained parameters, in fp32.
        optimizer: AdamW's two moments, in fp32.
        activations: what autograd keeps between forward and backward.
    """

    method: str
    trained: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Sizes:
    """What training a model would take.

    Attributes:
        num_blocks: DiaBlo's N.
        targets: what is adapted, by kind.
        trained: trained parameters.
        total: parameters of the model.
        memory: an estimate for DiaBlo, for LoRA of as many trained parameters and for full fine-tuning.
    """

    num_blocks: int
    targets: list[TargetKind]
    trained: int
    total: int
    memory: list[Memory]

    @property
    def learning_rate(self) -> float:
        """A rate to start a sweep of a short run from, to one digit: 0.1 over the rows of a block.

        A step of Adam moves every entry by about the rate, and an output by the sum over the rows of its block. Larger
        N, which makes blocks smaller, therefore takes a larger rate; ``docs/experiments/choice-of-n.md`` has it from
        32 steps of SmolLM2-135M.
        """
        rows = [BlockLayout(*kind.shape, self.num_blocks).block_in for kind in self.targets for _ in range(kind.count)]
        return float(f"{0.1 / statistics.median(rows):.0e}")


def plan_sizes(
    model: str,
    *,
    num_blocks: int | None = None,
    budget: float | None = None,
    target_modules: list[str] | str | None = None,
    batch_size: int = 1,
    length: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
) -> Sizes:
    """Work out what training a model would take. Only its config is read; the model is built on the meta device.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        num_blocks: DiaBlo's N; 64 where neither this nor ``budget`` is given.
        budget: the largest share of the model's parameters to train, from 0 to 1, in place of ``num_blocks``.
        target_modules: what to adapt; DiaBlo's default where None.
        batch_size: rows of a forward.
        length: tokens of a row.
        dtype: dtype of the frozen weights and of the activations.

    Raises:
        UserError: the model is not known, both or neither of the two sizes fit, or no N keeps to the budget.
    """
    if num_blocks is not None and budget is not None:
        raise UserError(f"--num-blocks and --budget: found {num_blocks} and {budget:.3%}; give one of the two.")
    if budget is not None and not 0 < budget < 1:
        raise UserError(f"--budget: found {budget:.3%}; give a share above 0 and below 100 %.")
    config = load_config(resolve_model(model))
    if budget is not None:
        num_blocks = _fitting_num_blocks(config, budget, target_modules)
    method = DiabloMethod(num_blocks=num_blocks or 64, target_modules=target_modules)
    adapted = _adapted(config, method, dtype)
    total = sum(parameter.numel() for parameter in meta_model(config).parameters())
    trained, _ = count_parameters(adapted)
    targets = target_kinds(adapted)
    rank = nearest_size(lambda size: LoraConfig(r=size), shapes_of(targets), trained)
    lora = LoraMethod(name="lora", r=rank, target_modules=target_modules)
    memory = [
        _memory(f"DiaBlo, N = {method.num_blocks}", adapted, batch_size, length),
        _memory(f"LoRA, r = {rank}", _adapted(config, lora, dtype), batch_size, length),
        # The weights that are trained are kept in fp32; autocast lowers what is computed with them.
        _memory("full fine-tuning", _adapted(config, FullMethod(name="full"), dtype), batch_size, length, full=True),
    ]
    return Sizes(method.num_blocks, targets, trained, total, memory)


def _adapted(config: PretrainedConfig, method: Any, dtype: torch.dtype) -> Any:
    config._attn_implementation = _ATTENTION
    return apply_method(meta_model(config).to(dtype), method).train()


def _fitting_num_blocks(config: PretrainedConfig, budget: float, target_modules: list[str] | str | None) -> int:
    """The smallest N that trains at most a share of the model's parameters."""
    model = meta_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    shapes = [
        (kind.shape, kind.count)
        for kind in target_kinds(apply_method(model, DiabloMethod(num_blocks=1, target_modules=target_modules)))
    ]
    most = min(min(shape) for shape, _ in shapes)
    for number in range(1, most + 1):
        blocks = sum(BlockLayout(*shape, number).num_parameters * count for shape, count in shapes)
        if blocks <= budget * total:
            return number
    raise UserError(
        f"--budget: found {budget:.3%}; the smallest share of this model that blocks on these targets can be is "
        f"{blocks / total:.3%}, with N = {most}. Raise it, or name fewer --target-modules."
    )


def _memory(name: str, model: nn.Module, batch_size: int, length: int, *, full: bool = False) -> Memory:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    adapter = sum(parameter.nbytes for parameter in trained)
    # In place, the diagonal of each weight is kept as it was: as many values as there are in the blocks.
    adapter += sum(
        layer.diablo_layout["default"].num_parameters * layer.get_base_layer().weight.element_size()  # type: ignore[operator]
        for layer in model.modules()
        if isinstance(layer, DiabloLayer)
    )
    return Memory(
        method=name,
        trained=count,
        weights=4 * count if full else sum(parameter.nbytes for parameter in frozen),
        adapter=0 if full else adapter,
        gradients=4 * count,
        optimizer=8 * count,
        activations=kept_for_backward(model, lambda: _loss_on_meta(model, batch_size, length)),
    )


def kept_for_backward(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps of a forward, parameters aside, on any device.

    Args:
        model: its parameters are not counted.
        forward: runs it and returns the loss.
    """
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Detached: a graph that keeps its own outputs through Python is a cycle, which is never freed.
        tensor = tensor.detach()
        if tensor.layout == torch.strided and tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph has to live while its tensors are counted.
        _loss = forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _loss_on_meta(model: Any, batch_size: int, length: int) -> torch.Tensor:
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss


class _Flash(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _Flash.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)
# Masks depend on values, which the meta device has not.
AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
