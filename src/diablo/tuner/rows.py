"""Rows of one batch can have different adapters: each adapted layer is told the adapter of each row."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from diablo.tuner.layers import DiabloLayer

BASE = "__base__"
"""The name that stands for no adapter, as in PEFT."""


@contextmanager
def names_for_rows(model: nn.Module, names: Sequence[str], beams: int) -> Generator[None]:
    """Within this context, hand ``adapter_names`` to every adapted layer and every module that is saved whole.

    Args:
        model: the model.
        names: the adapter of each row of the batch.
        beams: the number of beams of a beam search, which repeats each row that many times; 1 where there is none.
    """
    repeated = [name for name in names for _ in range(beams)]
    # The encoder of an encoder-decoder model sees the rows before the beam search repeats them.
    encoder = _encoder_modules(model) if beams > 1 else set()
    modules: list[Any] = [
        module for module in model.modules() if isinstance(module, (DiabloLayer, AuxiliaryTrainingWrapper))
    ]
    handles = [
        module.register_forward_pre_hook(
            partial(_give_names, adapter_names=list(names) if module in encoder else repeated), with_kwargs=True
        )
        for module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encoder_modules(model: Any) -> set[nn.Module]:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return set()
    return set(model.get_encoder().modules())


def _give_names(
    module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[Any, dict[str, Any]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        # PEFT's wrappers fail for an adapter that has not saved their module. Such an adapter uses the base module.
        adapter_names = [name if name in module._adapters else BASE for name in adapter_names]
    return args, {**kwargs, "adapter_names": adapter_names}
