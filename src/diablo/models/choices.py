"""Choices that have a name: the dtype of a model's weights, and what its layers keep for the backward."""

from __future__ import annotations

from typing import Literal, get_args

from diablo.errors import UserError

Checkpointing = Literal["none", "selective", "full"]
"""What a layer keeps for its backward.

``none``: all that autograd asks for. ``selective``: only results that take long to compute. ``full``: only its input.
"""

Dtype = Literal["bf16", "fp16", "fp32"]
"""The dtype of the weights."""


def check_dtype(name: str) -> None:
    """Check the name of a dtype.

    Raises:
        UserError: it is none of :data:`Dtype`.
    """
    if name not in get_args(Dtype):
        raise UserError(f"--dtype: found {name!r}; allowed: {', '.join(get_args(Dtype))}.")


def check_checkpointing(name: str) -> None:
    """Check the name of a way of gradient checkpointing.

    Raises:
        UserError: it is none of :data:`Checkpointing`.
    """
    if name not in get_args(Checkpointing):
        raise UserError(f"--gradient-checkpointing: found {name!r}; allowed: {', '.join(get_args(Checkpointing))}.")
