"""Gradient checkpointing: what a layer keeps for its backward, and what the backward computes again."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from diablo.models.choices import Checkpointing

SHORT_SUM = 256
"""A product whose sums have at most this many terms is cheap: a GPU computes it about as fast as it writes the result.

Cheap products are those with LoRA's second factor, those with DiaBlo's blocks, and the scores of an attention that is
not fused, which are sums over a head.
"""

# The operators that are products, and for each the position of the first matrix among its arguments.
_PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::_grouped_mm": 0}
_ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
}


def checkpointing_options(choice: Checkpointing) -> dict[str, Any] | None:
    """The ``gradient_checkpointing_kwargs`` of transformers for a choice; None for ``none``.

    The options can be pickled: transformers pickles the arguments of a trainer.
    """
    if choice == "none":
        return None
    return {"use_reentrant": False} | ({"context_fn": selective_contexts} if choice == "selective" else {})


def enable_checkpointing(model: Any, options: dict[str, Any]) -> None:
    """Have a model compute again in the backward what its layers do not keep.

    Args:
        model: a transformers model, or a ``PeftModel`` around one.
        options: from :func:`checkpointing_options`, or others for ``torch.utils.checkpoint``.
    """
    # Newer releases of transformers have the first, and warn that the second will go.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Two contexts for selective checkpointing: one for a forward, and one for the recomputation of that forward.

    They are for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=selective_contexts)``. The
    first context keeps results, and the second one hands them out instead of computing them again. Kept are products
    whose sums have more than ``SHORT_SUM`` terms, and fused attention without dropout. All else is computed again:
    norms, activations, gates, dropout and cheap products.

    torch's own ``create_selective_checkpoint_contexts`` does not work for DiaBlo. Blocks beside the weight are added to
    a product in place. This would change the result that torch has kept, and the gradients would be wrong. With blocks
    in the weight, a recomputation may have to write the blocks again. The forward did not have these operators, which
    is an error for torch.
    """
    kept: list[_Kept] = []
    return _Keep(kept), _Take(kept)


@dataclass(frozen=True)
class _Kind:
    """What an operator does.

    Attributes:
        written: positions of the arguments that it writes to. Where there are any, all keyword arguments, which have no
            position, are taken as written to as well.
        factor: position of the first matrix, where the operator is a product; None where it is not.
        dropout: position of the probability of dropout, where the operator is attention; None where it is not.
    """

    written: tuple[int, ...]
    factor: int | None
    dropout: int | None

    @property
    def is_dear(self) -> bool:
        """Whether its results can be worth keeping."""
        return self.factor is not None or self.dropout is not None

    def is_worth_keeping(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> bool:
        """Whether this result is worth keeping."""
        # Other classes of tensors may lie on several devices, or stand for something else. They cannot be recognised by
        # their memory.
        if any(type(tensor) is not torch.Tensor for tensor in _tensors(result)):
            return False
        if self.factor is not None:
            return args[self.factor].shape[-1] > SHORT_SUM
        # Attention with dropout draws random numbers. If the recomputation left that out, later dropouts would draw
        # other numbers than in the forward.
        at = self.dropout
        return (args[at] if at is not None and at < len(args) else kwargs.get("dropout_p", 0.0)) == 0


@functools.cache
def _kind(op: Any) -> _Kind:
    schema = getattr(op, "_schema", None)
    if schema is None:
        return _Kind((), None, None)
    names = [argument.name for argument in schema.arguments]
    written = tuple(
        at for at, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write
    )
    is_plain = op._overloadname == "default"
    dropout = names.index("dropout_p") if schema.name in _ATTENTION and is_plain else None
    return _Kind(written, _PRODUCTS.get(schema.name) if is_plain else None, dropout)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its graph. It shares the memory, and the version that counts the writes to it."""
    # With this dispatch key on, the new tensor shares the version of the old one instead of counting by itself.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Kept:
    """An operator of the forward, with its result.

    Attributes:
        op: the operator.
        result: its result, without autograd's graph; None where it is to be computed again.
        versions: for each tensor of the result, how often it had been written to when it was kept.
    """

    __slots__ = ("op", "result", "versions")

    def __init__(self, op: Any, result: Any) -> None:
        self.op = op
        self.set(None if result is None else tree_map_only(torch.Tensor, _without_graph, result))

    def set(self, result: Any) -> None:
        """Keep a result."""
        self.result = result
        self.versions = [tensor._version for tensor in _tensors(result)]


class _Keep(TorchDispatchMode):
    """Keeps the results of operators as they were computed. A result that is about to be overwritten is copied."""

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self.kept = kept
        self._by_storage: dict[int, _Kept] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compiled functions run as they do without this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind.written and self._by_storage:
            for tensor in _tensors([args[at] for at in kind.written if at < len(args)] + list(kwargs.values())):
                if own := self._by_storage.pop(tensor.untyped_storage()._cdata, None):
                    own.set(tree_map_only(torch.Tensor, torch.clone, own.result))
        result = func(*args, **kwargs)
        if kind.is_dear:
            own = _Kept(func, result if kind.is_worth_keeping(args, kwargs, result) else None)
            self.kept.append(own)
            self._by_storage |= {tensor.untyped_storage()._cdata: own for tensor in _tensors(own.result)}
        return result

    def __exit__(self, *exception: Any) -> None:  # pyrefly: ignore[bad-override]
        self._by_storage = {}
        super().__exit__(*exception)


class _Take(TorchDispatchMode):
    """Gives each operator of the recomputation the result that it had in the forward. Each result is given once."""

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self.kept = kept
        self._next: Iterator[_Kept] = iter(())

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: compiled functions run as they do without this mode."""
        return True

    def __enter__(self) -> Any:
        self._next = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _kind(func).is_dear:
            return func(*args, **kwargs or {})
        own = next(self._next, None)
        if own is None or own.op is not func:
            raise RuntimeError(
                f"Selective gradient checkpointing found {func} in a layer's recomputation, where its forward had "
                f"{'nothing more' if own is None else own.op}: the layer does not compute the same twice; use full."
            )
        if own.versions != [tensor._version for tensor in _tensors(own.result)]:
            raise RuntimeError(
                f"The result of {func}, which selective gradient checkpointing kept, was overwritten after the layer "
                "was left: use full."
            )
        if own.result is None:
            return func(*args, **kwargs or {})
        # The graph has the result now, and frees it as the backward goes on. So it is not kept here any longer.
        result, own.result, own.versions = own.result, None, []
        return result
