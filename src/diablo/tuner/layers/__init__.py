"""The adapted layers: a file for each way in which a module computes with its weight."""

from diablo.tuner.layers.base import DiabloLayer
from diablo.tuner.layers.choice import adapt_module
from diablo.tuner.layers.convolution import DiabloConv
from diablo.tuner.layers.embedding import DiabloEmbedding
from diablo.tuner.layers.linear import DiabloLinear
from diablo.tuner.layers.parameters import DiabloParameters
from diablo.tuner.layers.quantized import DiabloQuantizedLinear

__all__ = [
    "DiabloConv",
    "DiabloEmbedding",
    "DiabloLayer",
    "DiabloLinear",
    "DiabloParameters",
    "DiabloQuantizedLinear",
    "adapt_module",
]
