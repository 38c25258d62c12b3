"""A recipe to a trained adapter, through failures."""

from diablo.training.run import RunResult, train

__all__ = ["RunResult", "train"]
