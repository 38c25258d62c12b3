"""A digest of the base weights that an adapter is made for, so that loading it onto other ones does not go unnoticed.

Two models of one shape take each other's adapters: a base model and its instruct version, or two revisions of one. The
digest is of the diagonals that the adapter's blocks are added to: 1/N of each target. They are rounded to bf16 first,
so that a model has the same digest whether it is loaded in bf16, in fp32, or in fp16 where it is stored so.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from diablo.layout import Layout
from diablo.tuner.layers import DiabloLayer
from diablo.tuner.weights import Weight, is_distributed, is_quantized

CANNOT_BE_TOLD = (
    "It cannot be told whether the base model is the one that the adapter was trained on: the adapter has no digest of "
    "it, or the weights are quantized, were cast to or from fp16, or are not in this process's memory"
)


class OtherBaseWarning(UserWarning):
    """An adapter was loaded onto other base weights than it was trained on, or it cannot be told."""


def digest_of_base(diagonals: Iterable[tuple[torch.Tensor | None, Weight, Layout]]) -> str | None:
    """The digest of base weights at an adapter's targets.

    It depends on the values at the diagonals alone, and neither on names nor on the order of the targets.

    Args:
        diagonals: for each target its weight, as its module holds it, how the weight is read as a matrix, and the
            geometry of the blocks.

    Returns:
        The dtype of the weights and 128 bits of a SHA-256, such as ``"bfloat16:0f3a..."``; None where a value is out of
        reach: weights that are quantized, on the meta device or cut over processes.
    """
    dtypes, digests = set(), []
    for weight, reading, layout in diagonals:
        size = reading.in_features * reading.out_features
        if weight is None or weight.is_meta or is_distributed(weight) or weight.numel() % size or not weight.numel():
            return None
        matrix = reading.matrix(weight.detach())
        own = hashlib.sha256()
        for tile in layout.tiles:
            values = tile.of_weight(matrix).to(torch.bfloat16).contiguous().cpu()
            own.update(values.view(torch.int16).numpy().data)
        dtypes.add(str(weight.dtype).removeprefix("torch."))
        digests.append(own.digest())
    if not digests:
        return None
    return f"{'+'.join(sorted(dtypes))}:{hashlib.sha256(b''.join(sorted(digests))).hexdigest()[:32]}"


def digest_under(layers: Iterable[DiabloLayer], adapter_name: str) -> str | None:
    """The digest of the weights under an adapter, without what is merged into them.

    Args:
        layers: the adapted layers of a model.
        adapter_name: the adapter.

    Returns:
        As :func:`digest_of_base`.
    """
    own = [layer for layer in layers if layer.layouts_of(adapter_name)]
    if any(is_quantized(layer.get_base_layer()) for layer in own):
        return None
    merged = {layer: list(layer.merged_adapters) for layer in own if layer.merged}
    for layer in merged:
        layer.unmerge()
    try:
        return digest_of_base(
            (layer.get_base_layer()._parameters.get(name), layer.weights[name], layout)
            for layer in own
            for name, layout in layer.layouts_of(adapter_name).items()
        )
    finally:
        for layer, names in merged.items():
            layer.merge_instead(names)


def is_same_base(saved: Any, found: str | None) -> bool | None:
    """Whether two digests are of the same base weights.

    Args:
        saved: the digest in an adapter's settings, which a file may have in any form.
        found: the digest of the weights at hand.

    Returns:
        None where it cannot be told: one digest is missing, or one is of fp16 and the other is not, so that the weights
        may have been cast from what fp16 does not hold.
    """
    if not isinstance(saved, str) or found is None:
        return None
    (dtype, _, digest), (own, _, other) = saved.partition(":"), found.partition(":")
    if digest == other:
        return True
    return None if ("float16" in dtype.split("+")) != ("float16" in own.split("+")) else False


def warn_of_other_base(adapter_name: str, config: Any, found: str | None, model: str) -> None:
    """Warn where an adapter is loaded onto other base weights than it was made for, or where that cannot be told.

    Args:
        adapter_name: name of the adapter.
        config: its settings as they were saved, with a digest.
        found: the digest of the weights that it is loaded onto.
        model: what the model at hand is called.
    """
    is_same = is_same_base(config.base_digest, found)
    if is_same is False:
        made_for = config.base_model_name_or_path or "another model"
        warnings.warn(
            f"The adapter {adapter_name!r} was made for {made_for}, whose weights differ at its targets from those of "
            f"{'this one' if made_for == model else model}: what it learned does not fit them. Load the base model "
            "that it was trained on, in the revision of that time.",
            OtherBaseWarning,
            stacklevel=3,
        )
    elif is_same is None:
        warnings.warn(f"{CANNOT_BE_TOLD}.", OtherBaseWarning, stacklevel=3)


def digest_on_model(model: Any, adapter_name: str = "default") -> str | None:
    """The digest of the base weights that an adapter of a ``PeftModel`` was put onto; None for another method."""
    return getattr(model.base_model, "base_digests", {}).get(adapter_name)
