"""How one weight is quantized, and what a quantized one stands for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diablo.errors import UserError
from diablo.quantization.magr import reduce_magnitude
from diablo.quantization.scheme import Scheme

_DAMPING = 0.01
"""GPTQ adds this share of the Hessian's mean diagonal to the diagonal, as its authors do."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight after quantization.

    Attributes:
        tensors: the stored tensors, by their names in the GPTQ format.
        weight: ``(out_features, in_features)`` in fp32: the numbers that the stored integers stand for.
        error: ``||X (weight - original)|| / ||X original||`` over the calibration inputs ``X``.
    """

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    error: float


def quantize_weight(
    weight: torch.Tensor, bias: torch.Tensor | None, gram: torch.Tensor, scheme: Scheme
) -> QuantizedWeight:
    """Quantize the weight of a linear layer.

    The library gptqmodel does the work of GPTQ and packs the integers.

    Args:
        weight: ``(out_features, in_features)`` in fp32.
        bias: ``(out_features,)`` or None. It is stored unquantized.
        gram: ``(in_features, in_features)`` in fp32: the sum of ``x x^T`` over calibration inputs.
        scheme: what to quantize to.

    Raises:
        UserError: gptqmodel is missing.
    """
    start = weight
    if scheme.method == "magr-gptq":
        start = reduce_magnitude(weight, gram, group_size=scheme.group_size, alpha=scheme.alpha)
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bias is not None, device=weight.device)
    layer.weight.data = start.clone()
    if bias is not None:
        layer.bias.data = bias.float()
    with _library() as (gptq_class, config_class, _):
        config = config_class(
            bits=scheme.bits, group_size=scheme.group_size, sym=False, desc_act=False, offload_to_disk=False
        )
        task = gptq_class(layer, qcfg=config)
        task.quantizer.configure(bits=scheme.bits, sym=False, perchannel=True)
        # gptqmodel takes inputs, and here only their gram is known. Any inputs with that gram give the same result. For
        # rounding to the nearest the inputs are the unit vectors: with these, no weight can make up for another one.
        task.add_batch(_root(gram if scheme.needs_inputs else torch.eye(len(gram)).to(gram)).unsqueeze(0), None)
        scales, zeros, groups, *_ = task.fasterquant(percdamp=_DAMPING, group_size=scheme.group_size)
        packed = _packed_layer(layer, scheme)
        packed.pack_original(layer.cpu(), scales.cpu(), zeros.cpu(), groups.cpu())
        tensors = {name: tensor.contiguous() for name, tensor in packed.state_dict().items()}
    stored = dequantize(tensors, scheme).to(weight.device)
    return QuantizedWeight(tensors, stored, _relative_error(stored, weight, gram))


def dequantize(tensors: dict[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """The weight that stored tensors stand for, ``(out_features, in_features)`` in fp32.

    Args:
        tensors: the tensors of one layer, by their names in the GPTQ format.
        scheme: how the layer was quantized.

    Raises:
        UserError: gptqmodel is missing.
    """
    with _library():
        in_features, out_features = len(tensors["g_idx"]), tensors["scales"].shape[1]
        layer = _packed_layer(nn.Linear(in_features, out_features, bias="bias" in tensors, device="meta"), scheme)
        for name, tensor in tensors.items():
            layer.register_buffer(name, tensor)
        layer.post_init()
        return layer.dequantize_weight().T.float().contiguous()


def _packed_layer(layer: nn.Linear, scheme: Scheme) -> Any:
    with _library() as (_, _, packed_class):
        return packed_class(
            bits=scheme.bits,
            group_size=scheme.group_size,
            sym=False,
            desc_act=False,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=layer.bias is not None,
        )


def _root(gram: torch.Tensor) -> torch.Tensor:
    """Inputs ``X`` whose ``X^T X`` is the gram, with a millionth of its mean diagonal added to its diagonal."""
    damping = 1e-6 * gram.diagonal().mean()
    return torch.linalg.cholesky(gram + damping * torch.eye(len(gram)).to(gram), upper=True)


def _relative_error(found: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    def size(matrix: torch.Tensor) -> float:
        return float(((matrix @ gram) * matrix).sum().clamp(min=0))

    return (size(found - weight) / max(size(weight), torch.finfo(torch.float32).tiny)) ** 0.5


def check_library() -> None:
    """Check that the libraries that quantize and pack are installed.

    Raises:
        UserError: one is not; the message says how to install it.
    """
    with _library():
        return


@contextlib.contextmanager
def _library() -> Generator[tuple[Any, Any, Any]]:
    """gptqmodel's classes for GPTQ, its settings and its packed layer, in a context where it logs errors only."""
    environment = dict(os.environ)
    try:
        from logbar import LogBar

        log = LogBar.shared()
        level = log.level
        log.setLevel("ERROR")
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.quantization import GPTQ, QuantizeConfig
    except ImportError as error:
        raise UserError(
            f"Quantization needs gptqmodel and optimum ({error}); install them with: pip install 'diablo-peft[gptq]'."
        ) from None
    finally:
        # gptqmodel changes environment variables of the process when it is first imported. They are put back.
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    try:
        yield GPTQ, QuantizeConfig, TorchLinear
    finally:
        log.setLevel(level)
