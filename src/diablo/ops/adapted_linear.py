"""A frozen linear layer with blocks in its weight or beside it, as one function of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diablo.layout import Layout
from diablo.ops.linear import accumulate, outer_product
from diablo.ops.tile_product import as_rows


class AdaptedLinear:
    """``F.linear(x, weight, bias)`` of a frozen weight, with blocks in the weight or beside it.

    It gives gradients for ``x``, ``bias`` and the blocks. Derivatives of any order work.

    With the blocks in the weight, the forward is one product. The backward has one product more than that of the frozen
    layer: the gradient of the blocks, which is the diagonal of ``grad_y^T x`` and costs 1/N of that product. With the
    blocks beside the weight, the products with the blocks are accumulated into the output and into the input's
    gradient, so that no second tensor of their size exists. Only ``x`` is kept for the backward, as it is; the backward
    reads the weight again.

    Args:
        weight: ``(out_features, in_features)``, of any strides.
        bias: ``(out_features,)`` or None.
        blocks: the adapters' parameters, each of its layout's ``blocks_shape``. Beside the weight they are cast to the
            dtype of the product.
        layouts: the layout of each of the blocks.
        is_beside: whether the blocks are added beside the weight. Otherwise they stand in it while a pass runs.
        is_trained: whether any of the blocks gets a gradient. The input is kept only then.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        blocks: Sequence[torch.Tensor],
        layouts: Sequence[Layout],
        is_beside: bool,
        is_trained: bool,
    ) -> None:
        self.weight, self.bias, self.blocks, self.layouts = weight, bias, tuple(blocks), tuple(layouts)
        self.is_beside, self.is_trained = is_beside, is_trained
        device = weight.device.type
        self._autocast_device = device if torch.amp.is_autocast_available(device) else None

    def __call__(self, x: torch.Tensor, reach: Callable[[], None]) -> torch.Tensor:
        """The layer's output.

        Args:
            x: ``(..., in_features)``.
            reach: called at the start of a backward. It must make the weight hold the values that it holds now.

        Returns:
            ``(..., out_features)``.
        """
        # With few tokens, a layer's time goes into these lines. So one call asks first whether autocast is on at all.
        device = self._autocast_device
        if device is None or not torch.is_autocast_enabled(device) or (lower := lowered(x)) is None:
            return _apply(x, self.bias, self, reach, None, *self.blocks)
        bias = None if self.bias is None else self.bias.to(lower)
        with torch.autocast(device, enabled=False):
            return _apply(x.to(lower), bias, self, reach, lower, *self.blocks)

    def with_others(self, bias: torch.Tensor | None, blocks: Sequence[torch.Tensor]) -> AdaptedLinear:
        """The same layer with other tensors that hold the same values. Gradients then go to these tensors."""
        return AdaptedLinear(self.weight, bias, blocks, self.layouts, self.is_beside, self.is_trained)

    def transposed(self, blocks: Sequence[torch.Tensor]) -> AdaptedLinear:
        """The map from outputs back to inputs.

        Args:
            blocks: this layer's blocks, not transposed. A backward gives those that autograd has saved.
        """
        return AdaptedLinear(
            self.weight.T,
            None,
            [own.transpose(1, 2) for own in blocks],
            [layout.transposed for layout in self.layouts],
            self.is_beside,
            self.is_trained,
        )


def lowered(x: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast would compute a product of ``x``; None where autocast leaves the product alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lower: torch.dtype | None
) -> torch.Tensor:
    """``x W^T + bias``, with the weight cast to ``lower`` as autocast would; ``x`` and ``bias`` have it already."""
    return F.linear(x, weight if lower is None else weight.to(lower), bias)


def product_back(grad_y: torch.Tensor, weight: torch.Tensor, lower: torch.dtype | None) -> torch.Tensor:
    """``grad_y W``, the gradient of the input, with the weight cast to ``lower`` as autocast would."""
    return torch.matmul(grad_y, weight if lower is None else weight.to(lower))


class _Linear(torch.autograd.Function):
    """``y = x (W^T + blockdiag(blocks)) + bias``.

    It is bilinear in ``x`` and the blocks, so that its backward is made of the same products, transposed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        linear: AdaptedLinear,
        reach: Callable[[], None],
        lower: torch.dtype | None,
        *blocks: torch.Tensor,
    ) -> torch.Tensor:
        # Blocks and weight are saved so that autograd notices where they are overwritten before the backward. A weight
        # that has blocks in it is not saved, since every pass writes to it; `reach` makes its values right before they
        # are read. What is saved depends on the pass alone, so that a recomputation under checkpointing saves the same.
        kept = linear.weight if linear.is_beside else None
        ctx.save_for_backward(x if linear.is_trained else None, kept, *blocks)
        ctx.linear, ctx.reach, ctx.lower = linear, reach, lower
        y = F.linear(x, linear.weight, bias) if lower is None else product(x, linear.weight, bias, lower)
        if linear.is_beside:
            for own, layout in zip(blocks, linear.layouts, strict=True):
                accumulate(y, x, own, layout)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_y,) = grads
        # This comes before the saved tensors are read: under checkpointing, reading them runs the layers forward again.
        ctx.reach()
        x, _, *blocks = ctx.saved_tensors
        linear, lower, needed = ctx.linear, ctx.lower, ctx.needs_input_grad
        grad_x = grad_bias = None
        if needed[0] and torch.is_grad_enabled():
            back = linear.transposed(blocks)
            grad_x = _apply(grad_y, None, back, ctx.reach, lower, *back.blocks)
        elif needed[0]:
            grad_x = product_back(grad_y, linear.weight, lower)
            if linear.is_beside:
                for own, layout in zip(blocks, linear.layouts, strict=True):
                    accumulate(grad_x, grad_y, own.transpose(1, 2), layout.transposed)
        if needed[1]:
            grad_bias = as_rows(grad_y).sum(0)
        grads_of_blocks = [
            outer_product(x, grad_y, layout, own.dtype) if wanted else None
            for own, layout, wanted in zip(blocks, linear.layouts, needed[5:], strict=True)
        ]
        return grad_x, grad_bias, None, None, None, *grads_of_blocks


def _apply(*args: Any) -> torch.Tensor:
    # Function.apply runs Python code before it calls autograd. Only the transforms of torch.func need that code.
    if torch._C._are_functorch_transforms_active():
        return _Linear.apply(*args)
    return _apply_at_once(*args)


_apply_at_once = super(torch.autograd.Function, _Linear).apply  # pyrefly: ignore[missing-attribute]
