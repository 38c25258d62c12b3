"""A frozen linear layer with blocks, in its weight or beside it, as one function of autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from diablo.layout import Layout
from diablo.ops.linear import accumulate, outer_product
from diablo.ops.tile_product import as_rows


class AdaptedLinear:
    """``F.linear(x, weight, bias)`` of a frozen weight, with blocks that stand on its diagonal or are added beside it.

    It gives gradients for ``x``, ``bias`` and the blocks. With the blocks in the weight it is one product, and its
    backward adds the gradient of the blocks, that part of ``grad_y^T x``: 1/N of one. Beside, the products with the
    blocks are accumulated into the output and into the input's gradient, so that no second tensor of their size exists.
    Only ``x`` is kept for backward, as it is; the weight is read again then. Derivatives of any order work.

    Args:
        weight: ``(out_features, in_features)``, of any strides.
        bias: ``(out_features,)`` or None.
        blocks: the adapters' parameters, each of its layout's ``blocks_shape``; cast for a product beside.
        layouts: the geometry of each.
        is_beside: whether the blocks are added beside the weight. Otherwise they stand in it while a pass runs.
        is_trained: whether any of the blocks gets a gradient, for which the input is kept.
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
            reach: called first thing in a backward; it sees to it that the weight is again what it is now.

        Returns:
            ``(..., out_features)``.
        """
        # Layers with few tokens wait for these lines: whether there is anything to lower is asked first, in one call.
        device = self._autocast_device
        if device is None or not torch.is_autocast_enabled(device) or (lower := lowered(x)) is None:
            return _apply(x, self.bias, self, reach, None, *self.blocks)
        bias = None if self.bias is None else self.bias.to(lower)
        with torch.autocast(device, enabled=False):
            return _apply(x.to(lower), bias, self, reach, lower, *self.blocks)

    def with_others(self, bias: torch.Tensor | None, blocks: Sequence[torch.Tensor]) -> AdaptedLinear:
        """The same layer with other tensors for the same values, which gradients then go to."""
        return AdaptedLinear(self.weight, bias, blocks, self.layouts, self.is_beside, self.is_trained)

    def transposed(self, blocks: Sequence[torch.Tensor]) -> AdaptedLinear:
        """The map from outputs back to inputs, of these blocks, which are those of this one."""
        return AdaptedLinear(
            self.weight.T,
            None,
            [own.transpose(1, 2) for own in blocks],
            [layout.transposed for layout in self.layouts],
            self.is_beside,
            self.is_trained,
        )


def lowered(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast would lower a product of ``x`` to; None where it leaves it alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lower: torch.dtype | None
) -> torch.Tensor:
    """``x W^T + bias``, with the weight lowered as autocast would; ``x`` and ``bias`` are so already."""
    return F.linear(x, weight if lower is None else weight.to(lower), bias)


def product_back(grad_y: torch.Tensor, weight: torch.Tensor, lower: torch.dtype | None) -> torch.Tensor:
    """``grad_y W``, the gradient of the input, with the weight lowered as autocast would."""
    return torch.matmul(grad_y, weight if lower is None else weight.to(lower))


class _Linear(torch.autograd.Function):
    """``y = x (W^T + blocks) + bias``, bilinear in ``x`` and the blocks: its backward is the same, transposed."""

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
        # Blocks and weight are kept so that autograd notices where they are overwritten before backward. A weight with
        # blocks in it is not, since every pass writes to it; `reach` sees to it that it is right when it is read. What
        # is kept hangs on the pass and not on the moment, so that a recomputation under checkpointing keeps the same.
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
        # Before what is kept is asked for: under checkpointing, that runs the layers forward again.
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
    # What torch does in Python before it comes to this call is for the transforms of torch.func.
    if torch._C._are_functorch_transforms_active():
        return _Linear.apply(*args)
    return _apply_at_once(*args)


_apply_at_once = super(torch.autograd.Function, _Linear).apply
