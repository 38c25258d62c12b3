"""Gradient checkpointing: what a layer keeps for its backward, and what it computes again there."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Checkpointing = Literal["none", "selective", "full"]
"""What a layer keeps for its backward: all that autograd wants; what costs much to compute; or its input alone."""

SHORT_SUM = 256
"""The most terms of the sums that make a product cheap: writing their results down takes a GPU about as long.

Such are the products with LoRA's second factor and with DiaBlo's blocks, and the scores of an attention that is not
fused, which are sums over a head.
"""

# Products, by where their first matrix stands among the arguments.
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
    """What transformers' ``gradient_checkpointing_kwargs`` are for a choice; None where there is no checkpointing.

    The options can be pickled, as transformers does with those of a trainer.
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
    """The contexts of a forward that keeps products and attention, and of its recomputation, which takes them from it.

    They are for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=selective_contexts)``. Kept
    are products whose sums have more than ``SHORT_SUM`` terms, and fused attention without dropout. All else is
    computed again: norms, activations, gates, dropout and short products.

    torch's own ``create_selective_checkpoint_contexts`` does not do for DiaBlo. Beside the weight, blocks are added
    into a product in place, which changes what it has kept: the gradients are wrong. In the weight, a recomputation may
    have to write the blocks again, and operators that the forward did not have are an error there.
    """
    kept: list[_Kept] = []
    return _Keep(kept), _Take(kept)


@dataclass(frozen=True)
class _Kind:
    """What an operator does.

    Attributes:
        written: positions of the arguments that it writes to; those without a position are looked at too.
        factor: position of a product's first matrix; None where it is none.
        dropout: position of attention's probability of dropout; None where it is no attention.
    """

    written: tuple[int, ...]
    factor: int | None
    dropout: int | None

    @property
    def is_dear(self) -> bool:
        """Whether its results may be worth keeping."""
        return self.factor is not None or self.dropout is not None

    def is_worth_keeping(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> bool:
        """Whether this result is."""
        # What is in parts over several devices, or stands for something else, is not told apart by its memory.
        if any(type(tensor) is not torch.Tensor for tensor in _tensors(result)):
            return False
        if self.factor is not None:
            return args[self.factor].shape[-1] > SHORT_SUM
        # A recomputation without this draw would give the dropout after it other numbers.
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
    """The tensor with the same memory and the same count of writes, which no graph holds and which holds none."""
    # Otherwise it would have a count of its own.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Kept:
    """The result of an operator in the forward; None where it is to be computed again.

    Attributes:
        op: the operator.
        result: its result, without autograd's graph.
        versions: how often each of its tensors had been written to.
    """

    __slots__ = ("op", "result", "versions")

    def __init__(self, op: Any, result: Any) -> None:
        self.op = op
        self.set(None if result is None else tree_map_only(torch.Tensor, _without_graph, result))

    def set(self, result: Any) -> None:
        """Keep this."""
        self.result = result
        self.versions = [tensor._version for tensor in _tensors(result)]


class _Keep(TorchDispatchMode):
    """Keeps what operators compute, as they have computed it, also where it is overwritten afterwards."""

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self.kept = kept
        self._by_storage: dict[int, _Kept] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions run as they do without this mode."""
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

    def __exit__(self, *exception: Any) -> None:
        self._by_storage = {}
        super().__exit__(*exception)


class _Take(TorchDispatchMode):
    """Gives the operators of the recomputation what they have computed in the forward, once."""

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self.kept = kept
        self._next: Iterator[_Kept] = iter(())

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled functions run as they do without this mode."""
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
        # Handed out: the graph has it now, and lets go of it as the backward goes on.
        result, own.result, own.versions = own.result, None, []
        return result
