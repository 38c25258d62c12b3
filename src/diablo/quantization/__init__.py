"""Models in 4, 3 and 2 bits: rounding, GPTQ, and MagR before GPTQ."""

from diablo.quantization.calibration import calibration_rows, check_calibration
from diablo.quantization.scheme import METHODS, Scheme

__all__ = ["METHODS", "Scheme", "calibration_rows", "check_calibration"]
