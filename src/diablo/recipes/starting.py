"""The adapter that training goes on from, as the method of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diablo.errors import UserError
from diablo.models.folders import ADAPTER_CONFIG, adapter_folder, is_adapter, read_settings
from diablo.models.forms import TASKS_OF_HEADS
from diablo.models.heads import HEADS
from diablo.recipes.methods import DiabloMethod
from diablo.records.results import recipe_of_run

# What a config says of where an adapter comes from, and how it has begun.
_NOT_OF_THE_METHOD = {
    *(
        "auto_mapping",
        "base_digest",
        "base_model_name_or_path",
        "format_version",
        "inference_mode",
        "peft_type",
        "peft_version",
    ),
    *("revision", "task_type", "init_weights"),
    # They are read where the tokenizer is.
    "trainable_token_indices",
}
_AS_DEFAULT: dict[str, Any] = {"bias": "none", "in_place": "auto"}


def check_adapter(adapter: str | Path) -> None:
    """Check that training can go on from something.

    Args:
        adapter: what the recipe names.

    Raises:
        UserError: it is no adapter.
    """
    path = Path(adapter)
    if not path.is_dir():
        raise UserError(
            f"adapter: there is no folder {str(adapter)!r}; give a run, an adapter's folder or a checkpoint, and fetch "
            "one that is on the hub before: hf download ID --local-dir FOLDER"
        )
    if is_adapter(path):
        return
    if (path / "model").is_dir():
        raise UserError(
            f"adapter: {str(adapter)!r} is a run that has trained the whole model; give model: {path / 'model'} in its "
            "place."
        )
    raise UserError(
        f"adapter: {str(adapter)!r} has no {ADAPTER_CONFIG}; give a run that has an adapter, an adapter's folder or a "
        "checkpoint."
    )


def prompts_of_another_form(adapter: Path, chat: bool, chat_template: str | None, special_text: str) -> list[str]:
    """Settings by which a recipe puts its rows otherwise than the run that an adapter is of, each in a few words.

    Args:
        adapter: what training goes on from.
        chat: the recipe's key of this name; so are the others.

    Returns:
        Nothing where the adapter is of no run that is finished.
    """
    before = recipe_of_run(adapter.parent if adapter.parent.name == "checkpoints" else adapter)
    if not before:
        return []
    had_chat, had_template = before.get("chat", False), before.get("chat_template")
    had_special_text = before.get("data", {}).get("special_text", "keep")
    found = []
    if had_chat != chat:
        found.append(f"chat: {str(had_chat).lower()}")
    if had_template != chat_template:
        found.append("a chat_template of its own" if had_template else "the tokenizer's chat template")
    if had_special_text != special_text:
        found.append(f"data.special_text: {had_special_text}")
    return found


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
    if settings.get("task_type") in TASKS_OF_HEADS:
        # The head is trained whole in any case.
        others = [name for name in given.pop("modules_to_save", []) if name not in HEADS]
        given |= {"modules_to_save": others} if others else {}
    if kind == "DIABLO":
        named = {"dropout" if key == "diablo_dropout" else key: value for key, value in given.items()}
        named = {key: value for key, value in named.items() if _AS_DEFAULT.get(key) != value}
        if named.keys() <= DiabloMethod.model_fields.keys():
            return {"name": "diablo", **named}
    # It imports PEFT, which takes seconds.
    from diablo.recipes.peft_methods import without_defaults

    return {"name": "peft", "type": kind, **without_defaults(str(kind), given)}
