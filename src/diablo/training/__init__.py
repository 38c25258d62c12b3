"""Trains an adapter as a recipe says, and survives failures on the way."""

from diablo.training.run import RunResult, train

__all__ = ["RunResult", "train"]
