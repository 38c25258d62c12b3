"""Linear layers whose weight a quantization library holds: the blocks stand beside it, and merging quantizes again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diablo.layout import BlockLayout
from diablo.ops.weight import summed, write_to_diagonal
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers.linear import DiabloLinear
from diablo.tuner.weights import is_quantized


def quantization_backend(module: nn.Module, model: nn.Module) -> Any | None:
    """PEFT's access to the weight of a quantized layer.

    Args:
        module: the layer.
        model: the whole model. torchao's settings are read from it.

    Returns:
        A ``peft.utils.quantization_utils.QuantizationBackend``; None where the layer is not quantized.

    Raises:
        TypeError: the layer is quantized in a way that PEFT does not know. The message is the reason.
    """
    if not is_quantized(module):
        return None
    try:
        from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
    except ImportError:
        raise TypeError(f"a quantized {type(module).__name__}, which needs PEFT 0.20 or newer") from None
    try:
        backend = resolve_quantization_backend(module, **get_quantization_kwargs(model))
    except (ValueError, ImportError) as error:
        raise TypeError(f"a quantized {type(module).__name__}: {error}") from None
    if backend is None or backend.layer_type != "linear":
        raise TypeError(f"a quantized {type(module).__name__}, which PEFT does not know")
    return backend


def keep_backward(model: nn.Module) -> None:
    """Keep bitsandbytes and gptqmodel from rearranging 4-bit weights in the first evaluation, as they do on CPUs.

    A rearranged weight has no backward and cannot be dequantized, and these libraries raise no error for either. So
    training or merging after an evaluation would silently be wrong. The libraries' own way back is not exact.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if _chooses_kernel_once(module) and module.linear_mode is None:
            module.linear_mode = "train"


def check_backward(model: nn.Module, doing: str) -> None:
    """Refuse to train or merge where 4-bit weights were rearranged before the adapter was added.

    Args:
        model: the model, or one layer of it.
        doing: the action that is refused, as the start of the message.

    Raises:
        RuntimeError: a weight was rearranged; see :func:`keep_backward`.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        library = "bitsandbytes" if getattr(state, "packing_format_for_cpu", False) else None
        if _chooses_kernel_once(module) and "inference" in str(getattr(module, "linear_mode", "")).lower():
            library = "gptqmodel"
        if library is not None:
            raise RuntimeError(
                f"{doing} needs the 4-bit weight of {name or type(module).__name__}, which {library} rearranged "
                "when the model was evaluated before it had an adapter: load the model again, and add the adapter "
                "before the first evaluation."
            )


def _chooses_kernel_once(module: nn.Module) -> bool:
    """Whether a layer belongs to gptqmodel, and its first call decides for good whether it will have a backward."""
    return hasattr(module, "linear_mode") and hasattr(module, "dequantize_weight")


class DiabloQuantizedLinear(DiabloLinear):
    """A quantized linear layer with DiaBlo adapters.

    Merging dequantizes the weight, adds the blocks and quantizes the sum, which rounds the whole weight again. The
    unmerged base layer is kept meanwhile, so that unmerging is exact.

    Args:
        base_layer: the quantized layer.
        adapter_name: name of its first adapter.
        layout: layout of that adapter's blocks.
        config: that adapter's settings.
        backend: PEFT's access to the weight, from :func:`quantization_backend`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layout: BlockLayout, config: DiabloConfig, backend: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, layout, config)
        self.quantization_backend: Any = backend
        # The unmerged layer is in a list, where torch does not see it: while adapters are merged, its parameters are
        # not part of the model.
        self._unmerged: list[nn.Module] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add blocks to the dequantized weight and quantize the sum again.

        Args:
            safe_merge: refuse blocks that would put a NaN or an infinity into the weight, and leave it untouched.
            adapter_names: adapters to merge; the active ones where None.

        Raises:
            ValueError: the library cannot quantize again, or ``safe_merge`` found a value that is not finite.
            RuntimeError: the weight was rearranged before; see :func:`keep_backward`.
        """
        if not self.quantization_backend.supports_merge:
            raise ValueError(
                f"A weight that {self.quantization_backend.backend_name} has quantized cannot be merged into: merge "
                "into the model before quantization, or use the adapter unmerged."
            )
        super().merge(safe_merge, adapter_names)

    def _result(self, result: torch.Tensor) -> torch.Tensor:
        # Some libraries return a view that a function of theirs has made. Autograd allows no writing into such a view.
        return result.clone()

    def _dequantized(self) -> torch.Tensor:
        check_backward(self.get_base_layer(), "Merging")
        return self.quantization_backend.get_base_weight(self.get_base_layer()).detach()

    @torch.no_grad()
    def _write(self, adapter_names: list[str], safe_merge: bool) -> None:
        if self.merged:
            self._restore()
        weight = self._dequantized().clone()
        for layout, blocks in self.added(adapter_names)["weight"].items():
            write_to_diagonal(weight, summed(blocks), layout)
        if safe_merge and not torch.isfinite(weight).all():
            raise self._not_finite(adapter_names)
        warnings.warn(
            f"Merging into a weight of {self.quantization_backend.backend_name} quantizes it again, which rounds "
            "all of it: outputs differ a little from those of the unmerged adapter.",
            stacklevel=4,
        )
        self._unmerged = [self.base_layer]
        self.base_layer = copy.deepcopy(self.base_layer)
        self.quantization_backend.set_base_weight(self, weight)
        self.merged_adapters = list(adapter_names)

    @torch.no_grad()
    def _restore(self) -> None:
        merged, (self.base_layer,) = self.base_layer, self._unmerged
        here, there = (next(layer.parameters()).device for layer in (self.base_layer, merged))
        if here != there:
            # The model was moved while this layer was not part of it.
            self.base_layer.to(there)
        self._unmerged, self.merged_adapters = [], []
