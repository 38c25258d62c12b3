"""Weighted sums of adapters. They are exact, because an update is linear in its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from diablo.layout import Layout
from diablo.tuner.config import DiabloConfig
from diablo.tuner.layers import DiabloLayer, DiabloParameters


def check_combination(
    configs: Mapping[str, Any], adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
) -> None:
    """Refuse a combination of adapters that is not possible, before anything is changed.

    Args:
        configs: the settings of the model's adapters by name.
        adapters: names of the adapters to combine.
        weights: a factor for each.
        adapter_name: name of the new adapter.
        combination_type: ``"linear"``, the one that exists.

    Raises:
        ValueError: a name is unknown or taken, the lists differ in length, the combination type does not exist, or an
            adapter trains more than blocks.
    """
    if combination_type != "linear":
        raise ValueError(
            f"combination_type={combination_type!r} does not exist for DiaBlo; allowed: 'linear', the weighted sum "
            "of the blocks, which is exact."
        )
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"add_weighted_adapter takes one weight for each adapter, got {len(adapters)} adapters and "
            f"{len(weights)} weights."
        )
    if unknown := [name for name in adapters if name not in configs]:
        raise ValueError(f"The model has no adapters {', '.join(unknown)}; it has {', '.join(configs)}.")
    if adapter_name in configs:
        raise ValueError(f"The model already has an adapter {adapter_name!r}: choose another name, or delete it.")
    for name in adapters:
        config = configs[name]
        if config.modules_to_save or config.bias != "none" or config.trainable_token_indices:
            raise ValueError(
                f"The adapter {name!r} trains modules_to_save={config.modules_to_save}, bias={config.bias!r} and "
                f"trainable_token_indices={config.trainable_token_indices} beside its blocks; only adapters of blocks "
                "alone can be combined."
            )


def combined_config(first: Any, layers: Mapping[str, DiabloLayer], adapters: list[str]) -> DiabloConfig:
    """The settings of an adapter that adapts whatever at least one of several adapters adapts.

    Args:
        first: the settings of the first of them.
        layers: the model's adapted layers by name.
        adapters: names of the adapters.

    Raises:
        ValueError: two of the adapters cut a layer into different blocks.
    """
    layouts = _common_layouts(layers, adapters)
    return replace(
        first,
        target_modules=sorted(name for name, parameter in layouts if parameter is None),
        target_parameters=sorted(f"{name}.{parameter}" for name, parameter in layouts if parameter) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_digest=None,
        # These are full names, and a regular expression is matched against the end of a name.
        block_pattern={
            ".".join(filter(None, name)).replace(".", r"\."): layout.num_blocks
            for name, layout in layouts.items()
            if layout.num_blocks != first.num_blocks
        },
    )


def write_sum(layers: Iterable[DiabloLayer], adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Set the blocks of an adapter to the weighted sum of others' blocks. Where one has none, it counts as zero."""
    for layer in layers:
        for weight_name, target in layer.blocks_of(adapter_name).items():
            target.requires_grad_(False)
            target.data.zero_()
            for name, weight in zip(adapters, weights, strict=True):
                if (blocks := layer.blocks_of(name).get(weight_name)) is not None:
                    target.data.add_(blocks.data.to(target.dtype), alpha=weight)


def _common_layouts(layers: Mapping[str, DiabloLayer], adapters: list[str]) -> dict[tuple[str, str | None], Layout]:
    """The layouts of what at least one of the adapters adapts, by the module and, for a parameter, its own name."""
    layouts: dict[tuple[str, str | None], Layout] = {}
    for layer_name, layer in layers.items():
        for weight_name in layer.weights:
            found = {
                name: layer.layouts_of(name)[weight_name] for name in adapters if weight_name in layer.layouts_of(name)
            }
            if len(set(found.values())) > 1:
                raise ValueError(
                    f"The adapters cut {layer_name} into different blocks "
                    f"({', '.join(f'{name}: {layout.num_blocks}' for name, layout in found.items())}), whose sum "
                    "is not block-diagonal in either layout: combine adapters of equal num_blocks, or activate "
                    "them together with set_adapter, which adds them up."
                )
            if found:
                parameter = weight_name if isinstance(layer, DiabloParameters) else None
                layouts[layer_name, parameter] = next(iter(found.values()))
    return layouts
