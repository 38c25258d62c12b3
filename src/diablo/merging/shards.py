"""Merging file by file. The memory of one file of the base model is enough, whatever the model's size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from rich.console import Console
from safetensors import safe_open

from diablo.errors import UserError, first_line
from diablo.layout import Layout
from diablo.models.adapters import ADAPTER_WEIGHTS, check_tensors, read_adapter_config
from diablo.models.loading import meta_model
from diablo.models.stored_weights import StoredWeights, write_index, write_settings, write_tensors
from diablo.ops.weight import write_to_diagonal
from diablo.records.progress import ProgressReport
from diablo.tuner import DiabloConfig, DiabloLayer
from diablo.tuner.base_digest import digest_of_base
from diablo.tuner.weights import Owners, Weight


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one tensor of the base model.

    Attributes:
        key: the blocks' name in the adapter's file.
        layout: their geometry.
        weight: how the tensor is read as a matrix.
    """

    key: str
    layout: Layout
    weight: Weight


def find_updates(adapter: Path, stored: StoredWeights) -> dict[str, Update] | None:
    """What an adapter adds to each stored tensor. This is worked out on the meta device.

    Returns:
        The updates by the name of the tensor; None if the model has to be loaded. This is so if the adapter changes
        more than diagonals, or if the tensors are stored in another form than the model has them.

    Raises:
        UserError: the adapter does not fit the model.
    """
    config: Any = read_adapter_config(adapter)
    if not isinstance(config, DiabloConfig) or config.bias != "none" or config.layer_replication:
        return None
    # With a name, PEFT would warn that this model is another one.
    config.base_model_name_or_path = None
    model = meta_model(stored.config)
    owners = Owners(model)
    try:
        adapted = get_peft_model(model, config)
        expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(adapted).items()}
    except Exception as error:  # a config can ask for anything
        raise UserError(f"The adapter {str(adapter)!r} does not fit {stored.name!r}: {first_line(error)}") from None
    check_tensors(adapter, stored.name, expected)
    updates: dict[str, Update] = {}
    for path, layer in adapted.named_modules():
        if not isinstance(layer, DiabloLayer):
            continue
        for parameter, layout in layer.layouts_of("default").items():
            owned: Any = layer.get_base_layer()._parameters[parameter]
            name = f"{path.removeprefix('base_model.model.')}.{parameter}"
            key = next(
                (key for key in (f"{path}.diablo_blocks", f"{path}.diablo_blocks.{parameter}") if key in expected), ""
            )
            is_plain = name in stored.files and stored.shape(name) == tuple(owned.shape)
            if not key or not is_plain or len(owners.of(owned)) > 1:
                return None
            updates[name] = Update(key, layout, layer.weights[parameter])
    # What is trained besides the blocks, such as modules_to_save, takes the place of whole tensors.
    return updates if expected.keys() == {update.key for update in updates.values()} else None


def base_digest_of(stored: StoredWeights, updates: Mapping[str, Update]) -> str | None:
    """The digest of a model's stored weights at the diagonals that an adapter changes."""
    return digest_of_base((stored.read([name])[name], update.weight, update.layout) for name, update in updates.items())


def merge_shards(
    adapter: Path,
    stored: StoredWeights,
    updates: Mapping[str, Update],
    folder: Path,
    dtype: torch.dtype | None,
    console: Console | None = None,
) -> int:
    """Write each file of the base model with the blocks added, and read it back.

    Args:
        adapter: the adapter's folder.
        stored: the base model's files.
        updates: from :func:`find_updates`.
        folder: an empty folder.
        dtype: dtype of the written weights; each tensor's own if None.
        console: where progress is written; standard error if None.

    Returns:
        How many tensors were read back and found equal, to the bit, to the base's plus the blocks on the diagonals.

    Raises:
        UserError: a sum would not be finite, the disk is full, or a file that is read back differs from what was
            written.
    """
    kept = _kept_in_fp32(stored, dtype) if dtype is not None else ()
    verified = 0
    shards = stored.shards
    with (
        safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as blocks,
        ProgressReport(console or Console(stderr=True), "merging files", len(shards)) as report,
    ):
        for number, (path, names) in enumerate(shards.items(), start=1):
            merged = {name: _cast(tensor, name, dtype, kept) for name, tensor in stored.read(names).items()}
            for name in names:
                if name in updates:
                    _add(name, merged[name], blocks.get_tensor(updates[name].key), updates[name], adapter)
            write_tensors(merged, folder / path.name)
            del merged
            for name in names:
                base = _cast(stored.read([name])[name], name, dtype, kept)
                _check_written(folder / path.name, name, base, updates.get(name), blocks)
                verified += 1
            report.update(number)
    write_index(folder, [path.name for path in shards])
    write_settings(folder, stored, dtype)
    return verified


def _add(name: str, tensor: torch.Tensor, blocks: torch.Tensor, update: Update, adapter: Path) -> None:
    matrix = update.weight.matrix(tensor)
    write_to_diagonal(matrix, blocks, update.layout)
    if not all(bool(torch.isfinite(tile.of_weight(matrix)).all()) for tile in update.layout.tiles):
        raise UserError(
            f"The adapter {str(adapter)!r} cannot be merged: {name} would have NaN or infinite values; the adapter is "
            "broken, or its blocks overflow the weight's dtype."
        )


def _check_written(path: Path, name: str, base: torch.Tensor, update: Update | None, blocks: Any) -> None:
    """Check a tensor on disk against the base's and the blocks. Nothing else that was used to write it is used."""
    with safe_open(path, framework="pt") as written:
        tensor = written.get_tensor(name)
    if update is not None:
        found, wanted = update.weight.matrix(tensor), update.weight.matrix(base)
        values = blocks.get_tensor(update.key)
        for tile in update.layout.tiles:
            # The expected sum is written into the diagonal of the base's tensor. Then both tensors are compared as a
            # whole.
            ours = tile.of_weight(found)
            wide = torch.promote_types(ours.dtype, torch.float32)
            tile.of_weight(wanted).copy_(tile.of_weight(wanted).to(wide) + tile.of_blocks(values).to(wide))
    if not torch.equal(tensor, base):
        raise UserError(f"{path} was not written as it should be: {name} reads back otherwise; is the disk sound?")


def _cast(tensor: torch.Tensor, name: str, dtype: torch.dtype | None, kept: tuple[str, ...]) -> torch.Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if any(re.search(part, name) for part in kept) else dtype)


def _kept_in_fp32(stored: StoredWeights, dtype: torch.dtype) -> tuple[str, ...]:
    """Parts of the names of tensors that transformers loads in fp32, even if it is asked for another dtype."""
    model = meta_model(stored.config)
    names = {*(model._keep_in_fp32_modules_strict or ())} if dtype in (torch.float16, torch.bfloat16) else set()
    return tuple(names | ({*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()))
