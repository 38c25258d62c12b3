"""torch.compile of a model's layers, one by one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from diablo.errors import first_line


def layers_to_compile(model: nn.Module) -> list[nn.Module]:
    """The layers that repeat through a model. transformers makes all of its models of layers of one class."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def compiled_layers(model: nn.Module) -> Generator[None]:
    """A context in which the layers of a model run compiled. Outside of it they are as before.

    Layers that are alike share a graph, so that a model of many layers compiles as fast as one of a few. A graph serves
    every number of rows and tokens above 1. The modules stay the same objects with the same names.

    Args:
        model: a transformers model, or a ``PeftModel`` around one.
    """
    layers = layers_to_compile(model)
    try:
        for layer in layers:
            layer.compile(dynamic=True)
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def as_if_not_compiled() -> AbstractContextManager[None]:
    """A context in which compiled layers run as they were before, for what would take graphs of its own."""
    return torch.compiler.set_stance("force_eager")


def compiling_obstacle(device: torch.device) -> str | None:
    """Why torch.compile makes no code for a device; None where it does, which a small function is compiled to see.

    The usual reasons are a missing C++ compiler, and on a GPU a missing Triton.
    """
    try:
        torch.compile(_double)(torch.ones(8, device=device))
    # The compiler has many parts, each with errors of its own.
    except Exception as error:
        return first_line(error)
    return None


def _double(values: torch.Tensor) -> torch.Tensor:
    return values + values
