"""The PEFT tuner: settings, adapted layers, and the pass, during which the blocks stand in the weights."""

from diablo.tuner.config import DiabloConfig
from diablo.tuner.conversion import LoraConversion, convert_to_lora
from diablo.tuner.layers import (
    DiabloConv,
    DiabloEmbedding,
    DiabloLayer,
    DiabloLinear,
    DiabloParameters,
    DiabloQuantizedLinear,
)
from diablo.tuner.model import DiabloModel
from diablo.tuner.preview import TargetPreview, preview_targets
from diablo.tuner.rates import LowLearningRateWarning, suggested_learning_rate
from diablo.tuner.register import register
from diablo.tuner.swapping import hotswap_adapter

__all__ = [
    "DiabloConfig",
    "DiabloConv",
    "DiabloEmbedding",
    "DiabloLayer",
    "DiabloLinear",
    "DiabloModel",
    "DiabloParameters",
    "DiabloQuantizedLinear",
    "LoraConversion",
    "LowLearningRateWarning",
    "TargetPreview",
    "convert_to_lora",
    "hotswap_adapter",
    "preview_targets",
    "register",
    "suggested_learning_rate",
]

# At the end, when everything is there that PEFT is told of.
register()
