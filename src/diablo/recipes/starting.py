"""The adapter that training goes on from, as the method of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo.models.folders import adapter_folder, read_settings
from diablo.recipes.methods import DiabloMethod

# What a config says of where an adapter comes from, and how it has begun.
_NOT_OF_THE_METHOD = {
    *("auto_mapping", "base_digest", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
    *("revision", "task_type", "init_weights"),
}
_AS_DEFAULT: dict[str, Any] = {"bias": "none", "in_place": "auto"}


def method_of(adapter: str | Path) -> dict[str, Any]:
    """The section of a recipe that makes an adapter of the same form.

    Args:
        adapter: the adapter's folder, a checkpoint, or a run that has an adapter.

    Returns:
        DiaBlo's section where that has all that the adapter's config says, and else one of the type in PEFT.

    Raises:
        UserError: it is no adapter, or its config cannot be read.
    """
    settings = read_settings(adapter_folder(adapter))
    kind = settings.get("peft_type")
    given = {key: value for key, value in settings.items() if key not in _NOT_OF_THE_METHOD and value not in (None, {})}
    if kind == "DIABLO":
        named = {"dropout" if key == "diablo_dropout" else key: value for key, value in given.items()}
        named = {key: value for key, value in named.items() if _AS_DEFAULT.get(key) != value}
        if named.keys() <= DiabloMethod.model_fields.keys():
            return {"name": "diablo", **named}
    # It imports PEFT, which takes seconds.
    from diablo.recipes.peft_methods import without_defaults

    return {"name": "peft", "type": kind, **without_defaults(str(kind), given)}
