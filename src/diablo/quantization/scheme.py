"""What a weight is quantized to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from diablo.errors import UserError

if TYPE_CHECKING:
    from torch import nn

METHODS = ("magr-gptq", "gptq", "rtn")
BITS = (4, 3, 2)
GROUP_SIZES = (128, 64, 32, 16)

ALPHA = 1e-4
"""The weight of MagR's penalty that its authors use where each group of inputs has a grid."""


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized: as asymmetric integers, with a scale and a zero for each output and group of inputs.

    Attributes:
        bits: bits of a weight: 4, 3 or 2.
        group_size: number of neighbouring inputs that share a scale: 128, 64, 32 or 16.
        method: ``"rtn"`` rounds to the nearest. ``"gptq"`` (Frantar et al., ICLR 2023) changes the weights of later
            inputs to make up for the rounding of earlier ones. ``"magr-gptq"`` first shrinks the largest weights of
            each group (see :mod:`diablo.quantization.magr`) and then does the same as ``"gptq"``.
        alpha: weight of MagR's penalty, above 0.

    Raises:
        UserError: a value is not allowed.
    """

    bits: int = 4
    group_size: int = 64
    method: str = "magr-gptq"
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES), ("method", METHODS)):
            found: Any = getattr(self, name)
            if found not in allowed:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: found {found!r}; allowed: {', '.join(map(str, allowed))}.")
        if not self.alpha > 0:
            raise UserError(f"--alpha: found {self.alpha}; give a number above 0.")

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration inputs are used."""
        return self.method != "rtn"

    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` entry of a model's config, as transformers and serving engines read it."""
        return {
            "quant_method": "gptq",
            # Version 2 of the format stores zeros as they are. Version 1 stores each zero minus 1, so it cannot store a
            # zero of 0.
            "checkpoint_format": "gptq_v2",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": False,
            "desc_act": False,
            "meta": {"quantizer": ["diablo"], **asdict(self)},
        }

    def check(self, name: str, layer: nn.Linear) -> None:
        """Check that a layer can be quantized.

        Raises:
            UserError: the group size does not divide the number of the layer's inputs.
        """
        if layer.in_features % self.group_size:
            fitting = [str(size) for size in GROUP_SIZES if layer.in_features % size == 0]
            raise UserError(
                f"--group-size: found {self.group_size}, which does not divide the {layer.in_features} inputs of "
                f"{name}; sizes that do: {', '.join(fitting) or 'none'}."
            )
