"""What a forward keeps for the backward, in bytes, as far as the meta device tells it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from diablo.models.checkpointing import enable_checkpointing, selective_contexts
from diablo.models.forms import ENCODER_DECODER, form_of
from diablo.models.heads import Head, said

ATTENTION = "diablo_sizing"
"""The implementation of attention that keeps on the meta device what a fused one keeps."""


def kept_for_backward(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of what a forward makes and only its graph keeps, on any device, whatever way the graph keeps it.

    Args:
        forward: runs it and returns the loss.
    """
    with _Made() as made:
        loss = forward()
        alive = made.alive() - {loss.untyped_storage()._cdata}
    del loss
    # A graph may refer to itself through Python.
    gc.collect()
    return made.bytes_of(alive - made.alive())


def kept_on_meta(model: Any, batch_size: int, length: int, checkpointing: str) -> int:
    """Bytes of what a model keeps for the backward at most, with attention by :data:`ATTENTION`.

    Args:
        model: the model, on the meta device.
        batch_size: rows of a forward.
        length: tokens of a row.
        checkpointing: ``training.gradient_checkpointing`` of the recipe.
    """
    if checkpointing == "none":
        return kept_for_backward(lambda: _loss_on_meta(model, batch_size, length))
    forward_and_again = selective_contexts if checkpointing == "selective" else lambda: (nullcontext(), nullcontext())
    counts: list[set[int]] = []

    def contexts() -> tuple[Any, Any]:
        forward, again = forward_and_again()
        return forward, look_after(again)

    @contextmanager
    def look_after(again: Any) -> Generator[None]:
        try:
            with again:
                yield
        finally:
            counts.append(made.alive())

    enable_checkpointing(model, {"use_reentrant": False, "context_fn": contexts})
    with _Made() as made:
        loss = _loss_on_meta(model, batch_size, length)
        counts.append(made.alive())
        loss.backward()
    del loss
    gc.collect()
    left = made.alive()
    return max(made.bytes_of(alive - left) for alive in counts)


class _Made(TorchDispatchMode):
    """Keeps an eye on the memory of what is computed, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {tensor.untyped_storage()._cdata for tensor in _strided((args, kwargs))}
        for tensor in _strided(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                # Whoever is referred to keeps its number, also after its death.
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self) -> set[int]:
        """The numbers of what is still there."""
        return {number for number, (reference, _) in self._made.items() if not reference.expired()}

    def bytes_of(self, numbers: set[int]) -> int:
        """The bytes of these."""
        return sum(self._made[number][1] for number in numbers)


def _strided(values: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]


def _loss_on_meta(model: Any, batch_size: int, length: int) -> torch.Tensor:
    ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
    if form_of(model.config) == ENCODER_DECODER:
        # Half of a row is read, and half of it written.
        written = ids.new_zeros(batch_size, length // 2)
        read = ids.new_zeros(batch_size, length - length // 2)
        return model(input_ids=read, attention_mask=torch.ones_like(read), labels=written, use_cache=False).loss
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if Head.of(model.config) is not None:
        return said(model(**given)).float().square().sum()
    return model(**given, labels=ids, use_cache=False).loss


class _Flash(torch.autograd.Function):
    """What a fused attention keeps: its inputs, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # The operator itself, by which selective checkpointing knows it.
        output, of_rows, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
        ctx.save_for_backward(query, key, value, output, of_rows)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return _Flash.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend)
# Masks depend on values, which the meta device has not.
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
