"""The choice of the layer that takes the place of a module: it computes with the weight as the module does."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from diablo.layout import BlockLayout
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.layers.convolution import DiabloConv
from diablo.tuner.layers.embedding import DiabloEmbedding
from diablo.tuner.layers.linear import DiabloLinear
from diablo.tuner.layers.module import ModuleLayer
from diablo.tuner.layers.quantized import DiabloQuantizedLinear, quantization_backend
from diablo.tuner.layers.tensor_parallel import DiabloParallelLinear, slices_of

_KINDS: tuple[tuple[type[ModuleLayer], tuple[type[nn.Module], ...]], ...] = (
    (DiabloLinear, (nn.Linear, Conv1D)),
    (DiabloEmbedding, (nn.Embedding,)),
    (DiabloConv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
)


def adapt_module(
    model: nn.Module, name: str, module: nn.Module, adapter_name: str, layout: BlockLayout, config: DiabloConfig
) -> DiabloLayer:
    """Put around a module the layer that computes with the weight as the module does.

    Args:
        model: the model. It says how its modules are cut over processes and quantized.
        name: the module's name in it.
        module: the module, of a kind that can be adapted.
        adapter_name: name of the adapter.
        layout: the geometry of its blocks.
        config: its settings.

    Raises:
        TypeError: the module is cut or quantized in a way in which it cannot be adapted.
    """
    slices = slices_of(model, name, module)
    if slices is not None:
        return DiabloParallelLinear(module, adapter_name, layout, config, slices)
    backend = quantization_backend(module, model)
    if backend is not None:
        return DiabloQuantizedLinear(module, adapter_name, layout, config, backend)
    layer = next(layer for layer, modules in _KINDS if isinstance(module, modules))
    return layer(module, adapter_name, layout, config)
