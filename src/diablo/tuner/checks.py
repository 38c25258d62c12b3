"""What must hold before an adapter is put into a model, or merged: each fault is found before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from diablo.tuner.config import DiabloConfig
from diablo.tuner.given import name_before_compiling
from diablo.tuner.layers import DiabloLayer, DiabloParameters
from diablo.tuner.outside import listed
from diablo.tuner.targets import Target, target_obstacle
from diablo.tuner.weights import Owners, recomputed


def check_not_saved_whole(layers: Mapping[str, DiabloLayer], config: DiabloConfig) -> None:
    """Refuse to train a layer whole that another adapter adapts.

    PEFT refuses it only when this adapter is in the model already.
    """
    saved = tuple(config.modules_to_save or ())
    if names := [name for name in layers if name.endswith(saved)]:
        raise ValueError(
            f"modules_to_save has {listed(names)}, which another adapter of the model adapts by blocks: adapt it "
            "here too as one of the target_modules, or put this adapter on a model without the other one."
        )


def new_layer_ranges(configs: Iterable[Any], peft_config: DiabloConfig) -> list[tuple[int, int]] | None:
    """The ranges of layers that the model has to be rebuilt from; None if it is as the adapter needs it."""
    others = [config.layer_replication for config in configs if config is not peft_config]
    if not others:
        return peft_config.layer_replication
    if peft_config.layer_replication != others[0]:
        raise ValueError(
            f"layer_replication={peft_config.layer_replication!r} differs from that of the model's first adapter, "
            f"{others[0]!r}: all adapters of a model have the same layers."
        )
    return None


def modules_with_parameters(targets: Sequence[Target], layers: Mapping[str, DiabloLayer]) -> set[str]:
    """The modules that are adapted by their parameters, by their names in a model that is not compiled.

    Args:
        targets: what is to be adapted.
        layers: the model's adapted layers by name.

    Raises:
        ValueError: a module is adapted both as a module and by its parameters, by this adapter or another one.
    """
    found = {name_before_compiling(target.module) for target in targets if target.parameter is not None}
    for target in targets:
        layer = layers.get(target.module)
        by_parameters = target.parameter is not None
        if (not by_parameters and name_before_compiling(target.module) in found) or (
            layer is not None and isinstance(layer, DiabloParameters) != by_parameters
        ):
            raise ValueError(
                f"{target.module} is adapted both as a module and by its parameters: name it in target_modules or "
                "in target_parameters, the same for every adapter."
            )
    return found


def check_in_place(model: nn.Module, targets: Sequence[Target], config: DiabloConfig) -> None:
    """Refuse ``in_place=True`` where it is impossible, before anything is changed."""
    if config.in_place is not True:
        return
    owners = Owners(model)
    for target in targets:
        reason = target_obstacle(model, target, config, owners)
        if reason is not None:
            raise ValueError(
                f"in_place=True is impossible for {target.name}: {reason}. Set in_place='auto', which writes the "
                "blocks into the weights where that is possible and adds their product beside elsewhere."
            )


def check_mergeable(model: nn.Module, layers: Mapping[str, DiabloLayer]) -> None:
    """Refuse to merge where the merged blocks would be lost, or would change another module's output.

    Raises:
        ValueError: a weight is computed anew in each forward, or another module shares it.
    """
    owners = Owners(model)
    for name, layer in layers.items():
        base_layer = layer.get_base_layer()
        if (how := recomputed(base_layer)) is not None:
            raise ValueError(
                f"{name} has no weight to merge into, since {how.by} computes it anew in each forward: use the "
                f"adapter unmerged, or call {how.undo} first, where layer is the model's module of that name."
            )
        sharing = max((owners.of(base_layer._parameters.get(own)) for own in layer.weights), key=len)
        if len(sharing) > 1:
            raise ValueError(
                f"{name} shares its weight with {', '.join(other for other in sharing if other != name)}: merging "
                "would change both. Untie them first (load the model with tie_word_embeddings=False and copy the "
                "weight), or use the adapter unmerged."
            )
