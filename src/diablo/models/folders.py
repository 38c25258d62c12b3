"""Folders of adapters and models: which is one, and how a new one is made whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diablo.errors import UserError, first_line
from diablo.records.formats import ADAPTER_FORMAT, FORMAT_KEY, format_fault

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def adapter_folder(path: str | Path) -> Path:
    """The folder of an adapter, given that folder or the output folder of a run.

    Raises:
        UserError: neither holds an adapter.
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    raise UserError(f"{str(path)!r} is no adapter: it has no {ADAPTER_CONFIG}; give the folder that training wrote.")


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter's folder, or a run's that has one."""
    return any((folder / ADAPTER_CONFIG).is_file() for folder in (Path(path), Path(path) / "adapter"))


def read_settings(adapter: Path) -> dict[str, Any]:
    """What the config of an adapter says, as it stands in the file.

    Args:
        adapter: the adapter's folder.

    Raises:
        UserError: it cannot be read, or is of a newer format.
    """
    path = adapter / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} cannot be read: it holds a {type(settings).__name__} in place of an object.")
    if settings.get("peft_type") == "DIABLO" and (fault := format_fault(settings.get(FORMAT_KEY), ADAPTER_FORMAT)):
        raise UserError(f"{path} cannot be read: {fault}.")
    return settings


def base_model_of(adapter: Path) -> str:
    """Folder or hub id of the model that an adapter was trained on.

    Raises:
        UserError: the adapter's config cannot be read or does not say.
    """
    name = read_settings(adapter).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{adapter / ADAPTER_CONFIG} does not name a base model; give one with --base.")
    return name


def check_new_folder(folder: Path, what: str) -> None:
    """Check that a folder can be made, or is empty.

    Args:
        folder: the folder.
        what: what is to be written there, for the message.

    Raises:
        UserError: the folder has files, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} exists and is not empty; give a new folder for the {what}.")


@contextmanager
def new_folder(folder: Path, what: str) -> Generator[Path]:
    """A scratch folder to write into, renamed to ``folder`` when nothing has gone wrong: it is never half written.

    Args:
        folder: the folder to make; it must not exist or be empty.
        what: what is written there, for the message.

    Raises:
        UserError: the folder has files, or is a file.
    """
    check_new_folder(folder, what)
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            target = Path(scratch) / "new"
            target.mkdir()
            yield target
            put_in_place(target, folder)
    except BaseException:
        for parent in made:
            parent.rmdir()
        raise


def put_in_place(source: Path, folder: Path) -> None:
    """Rename a folder that is whole; what has the name is deleted."""
    if folder.exists():
        shutil.rmtree(folder)
    source.rename(folder)
