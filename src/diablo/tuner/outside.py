"""The parts of a model that lie outside of the adapters that it may already have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn


def modules_outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The named modules of a model. What lies inside of modules that adapters have put there is left out."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
        found.append((name, module))
    return found


def held_modules(model: nn.Module) -> dict[str, str]:
    """The modules that adapters train and save whole, and all modules inside of them.

    Each name is mapped to the name of the module that is saved whole.
    """
    return {
        f"{name}.{inner}".rstrip("."): name
        for name, module in modules_outside_adapters(model)
        if isinstance(module, AuxiliaryTrainingWrapper)
        for inner, _ in module.named_modules()
    }


def check_not_held(model: nn.Module, names: Iterable[str], asked_by: str) -> None:
    """Refuse to adapt what another adapter trains whole.

    The blocks would be in that adapter's copy as well, and would be saved by the name of the copy.

    Args:
        model: the model.
        names: modules that are to be adapted.
        asked_by: what asks for them, for messages.

    Raises:
        ValueError: one of them is held.
    """
    held = held_modules(model)
    wrappers = list(dict.fromkeys(held[name] for name in names if name in held))
    if not wrappers:
        return
    wrapper: Any = model.get_submodule(wrappers[0])
    setting, whole = "trainable_token_indices", ""
    if isinstance(wrapper, ModulesToSaveWrapper):
        setting, whole = "modules_to_save", "train them whole by modules_to_save here too, "
    raise ValueError(
        f"{asked_by} match {listed(wrappers)} or modules inside, of which the {setting} of another adapter "
        f"({', '.join(sorted(wrapper._adapters)) or 'since deleted'}) keeps a copy: leave them out by exclude_modules, "
        f"{whole}or put this adapter on a model of its own."
    )


def base_layer_of(module: nn.Module) -> nn.Module:
    """The layer under a module's adapters, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def listed(items: Any, most: int = 8) -> str:
    """Names for a message. Of many names, the first ones and how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"
