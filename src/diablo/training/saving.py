"""Checkpoints that are whole or not there: written under another name, synced, renamed, and checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from diablo.errors import UserError, first_line
from diablo.records.formats import FORMAT_KEY, RUN_FORMAT, format_fault
from diablo.records.results import write_json

if TYPE_CHECKING:
    import torch

STAGING = "unfinished"
"""The folder beside the checkpoints in which the next one is written."""

BEST = "best.safetensors"
"""In a checkpoint, the trained parameters of the best held-out loss so far."""

AVERAGE = "average.safetensors"
"""In a checkpoint, the average of the trained parameters."""

_MANIFEST = "manifest.json"


def publish(folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Move the checkpoints in the staging folder to their final place.

    Each gets a manifest: a list of its files with their sizes and digests. Everything is synced to the disk before a
    checkpoint gets its final name.

    Args:
        folder: the folder of the checkpoints. The staging folder is in it.
        about: further facts to keep in each manifest; see :func:`about`.

    Returns:
        The folders of the checkpoints.
    """
    published = []
    for staged in sorted((folder / STAGING).glob("checkpoint-*")):
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        described = {str(path.relative_to(staged)): _describe(path) for path in files}
        write_json(staged / _MANIFEST, {FORMAT_KEY: RUN_FORMAT, "about": dict(about), "files": described})
        for path in [*files, staged / _MANIFEST]:
            _sync(path)
        for path in [*(path for path in staged.rglob("*") if path.is_dir()), staged]:
            _sync(path)
        target = folder / staged.name
        shutil.rmtree(target, ignore_errors=True)
        staged.rename(target)
        published.append(target)
    _sync(folder)
    clear_staging(folder)
    return published


def clear_staging(folder: Path) -> None:
    """Delete the staging folder, with what an interrupted save has left in it."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def last_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The last checkpoint that is whole.

    Args:
        folder: the folder of the checkpoints; it need not exist.

    Returns:
        The folder of the checkpoint, or None where none is whole; and for each later checkpoint, by its name, why it is
        not whole.

    Raises:
        UserError: a checkpoint is of a newer format, by which alone it can be told whether it is whole.
    """
    found = {}
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    torn: dict[str, str] = {}
    for step in sorted(found, reverse=True):
        fault = _fault(found[step])
        if fault is None:
            return found[step], torn
        torn[found[step].name] = fault
    return None, torn


def about(checkpoint: Path) -> dict[str, Any]:
    """The further facts in the manifest of a checkpoint that is whole; see :func:`publish`."""
    return json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))["about"]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a file; no file where there are none."""
    from safetensors.torch import save_file

    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, on the CPU; none where there is no file."""
    from safetensors.torch import load_file

    return load_file(path) if path.is_file() else {}


@contextmanager
def writing(folder: Path) -> Generator[None]:
    """A context for code that writes to a folder. It turns a failed write into an error for the user.

    Raises:
        UserError: a file could not be written, for instance because the disk is full.
    """
    try:
        yield
    except Exception as error:
        if not is_failed_write(error):
            raise
        raise UserError(
            f"{str(folder)!r} cannot be written to: {first_line(error)}. Is the disk full? Make room, and go on with "
            "--resume where the run has checkpoints."
        ) from None


def is_failed_write(error: Exception) -> bool:
    """Whether an error says that a file could not be written, for instance because the disk is full."""
    return isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter" in str(error)


def _fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None where it is."""
    path = checkpoint / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        newer = format_fault(manifest.get(FORMAT_KEY), RUN_FORMAT)
        expected = {str(name): dict(entry) for name, entry in manifest["files"].items()}
        dict(manifest["about"])
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"it has no readable {_MANIFEST}"
    if newer is not None:
        raise UserError(f"{path} cannot be read: {newer}.")
    for name, entry in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry.get("bytes"):
            return f"{name} has {file.stat().st_size} bytes in place of {entry.get('bytes')}"
        if _describe(file) != entry:
            return f"{name} has changed since it was written"
    return None


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while part := file.read(1 << 20):
            digest.update(part)
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
