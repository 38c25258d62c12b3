"""Trains an adapter as a recipe says, and survives failures on the way."""

from diablo.training.starting import train

__all__ = ["train"]
