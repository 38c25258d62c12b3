"""The PEFT tuner: configuration, layers, model and the registration of the method."""

from diablo.tuner.config import DiabloConfig
from diablo.tuner.layer import DiabloLayer, DiabloLinear
from diablo.tuner.model import DiabloModel
from diablo.tuner.register import register

__all__ = ["DiabloConfig", "DiabloLayer", "DiabloLinear", "DiabloModel", "register"]
