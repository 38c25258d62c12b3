"""A quantized model turned into a plain one: every packed weight becomes the numbers that it stands for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from diablo.errors import UserError
from diablo.models.forms import auto_class
from diablo.tuner.layers.quantized import check_backward, quantization_backend
from diablo.tuner.weights import is_quantized


@torch.no_grad()
def dequantized_model(model: Any, dtype: torch.dtype) -> Any:
    """A plain model with the weights that a quantized one computes with.

    Args:
        model: a causal language model whose weights bitsandbytes, torchao or GPTQ holds. It has no adapter, and it was
            not evaluated yet.
        dtype: dtype of the plain weights.

    Returns:
        A transformers model on the CPU in evaluation mode.

    Raises:
        UserError: the quantization library cannot turn the packed weights back.
        RuntimeError: the model was evaluated before, which has rearranged its 4-bit weights.
    """
    check_backward(model, "Merging")
    tensors: dict[str, torch.Tensor] = {}
    packed: list[str] = []
    for name, module in model.named_modules():
        if not is_quantized(module):
            continue
        packed.append(f"{name}.")
        tensors[f"{name}.weight"] = _weight(name, module, model)
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(packed)):
            tensors[name] = tensor
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = auto_class(config).from_config(config, dtype=dtype)
    cast = {name: tensor.to("cpu", dtype if tensor.is_floating_point() else None) for name, tensor in tensors.items()}
    plain.load_state_dict(cast, assign=True)
    plain.tie_weights()
    return plain.eval()


def _weight(name: str, module: Any, model: nn.Module) -> torch.Tensor:
    """The plain weight of a quantized layer, ``(out_features, in_features)``."""
    if hasattr(module, "dequantize_weight"):
        # This is gptqmodel's method. Its weight is (in_features, out_features).
        return module.dequantize_weight().T
    try:
        backend = quantization_backend(module, model)
        assert backend is not None  # it is quantized
        return backend.get_base_weight(module).detach()
    except TypeError as error:
        raise UserError(f"{name} cannot be dequantized: {error}; use the adapter beside the model.") from None
