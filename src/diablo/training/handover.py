"""Weights handed to an engine that generates: those alone that training changes, with the adapter in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from diablo.tuner import DiabloLayer


@torch.no_grad()
def changed_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that training changes, one after another, as a merged model has them.

    An engine that has loaded the base model needs no others. One layer at a time is merged and put back to the bit, so
    that no more memory is taken than one weight needs, and nothing has changed between two steps of the iteration.

    Args:
        model: a model that is trained whole, or a ``PeftModel`` whose active adapter stands in linear layers.

    Yields:
        The name that the weight has in the base model's checkpoint, and its values, which stay as they are.
    """
    if not isinstance(model, PeftModel):
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
        return
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield f"{name}.weight", _merged(layer)


def _merged(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.get_base_layer().weight
    # Subtracting an update again, as other methods do, would leave rounding behind, more with every step.
    kept = None if isinstance(layer, DiabloLayer) else weight.detach().clone()
    layer.merge()
    merged = weight.detach().clone()
    layer.unmerge()
    if kept is not None:
        weight.copy_(kept)
    return merged
