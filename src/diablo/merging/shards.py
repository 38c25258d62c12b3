"""Merging file by file. The memory of one file of the base model is enough, whatever the model's size."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils.other import TrainableTokensWrapper
from rich.console import Console
from safetensors import safe_open
from transformers import PretrainedConfig

from diablo.errors import UserError, first_line
from diablo.layout import Layout
from diablo.merging.untying import copies_for, ties_of, untied_config
from diablo.models.adapters import check_tensors, read_adapter_config
from diablo.models.folders import ADAPTER_WEIGHTS
from diablo.models.forms import TASKS_OF_HEADS
from diablo.models.loading import meta_model
from diablo.models.saving import shapes_in_file
from diablo.models.stored_weights import StoredWeights, write_index, write_settings, write_tensors
from diablo.models.vocabulary import TrainedTokens, config_with_rows, with_rows
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


@dataclass(frozen=True)
class Rows:
    """The rows of tokens that an adapter puts into one tensor of the base model.

    Attributes:
        key: their name in the adapter's file.
        ids: the tokens.
    """

    key: str
    ids: list[int]


@dataclass(frozen=True)
class Changes:
    """How a merged model differs from its base.

    Attributes:
        updates: what is added, by the name of the tensor.
        untied: the tensors that are no longer tied, each with the one that it was tied to.
        copies: the untied tensors that the base does not store, each with the stored one that it is a copy of.
        config: the merged model's config.
        rows: the rows of tokens that are put in, by the name of the tensor.
        tokens: these tokens; None where there are none.
    """

    updates: Mapping[str, Update]
    untied: Mapping[str, str]
    copies: Mapping[str, str]
    config: PretrainedConfig
    rows: Mapping[str, Rows] = field(default_factory=dict)
    tokens: TrainedTokens | None = None


def find_changes(adapter: Path, stored: StoredWeights, tokens: TrainedTokens | None = None) -> Changes | None:
    """What an adapter adds to each stored tensor. This is worked out on the meta device.

    If it changes a weight that modules share, each of these modules gets a weight of its own. Rows of tokens are the
    exception: modules that share a weight share them.

    Args:
        adapter: the adapter's folder.
        stored: the base model's files.
        tokens: the tokens whose rows the adapter has trained.

    Returns:
        The changes; None if the model has to be loaded. This is so if the adapter changes more than diagonals, or if
        the tensors are stored in another form than the model has them.

    Raises:
        UserError: the adapter does not fit the model.
    """
    config: Any = read_adapter_config(adapter)
    has_head = config.task_type in TASKS_OF_HEADS
    if not isinstance(config, DiabloConfig) or config.bias != "none" or config.layer_replication or has_head:
        return None
    # With a name, PEFT would warn that this model is another one.
    config.base_model_name_or_path = None
    plain = config_with_rows(stored.config, tokens)
    ties = ties_of(meta_model(plain))
    copies = copies_for(ties, stored.files)
    if copies is None:
        return None
    if tokens is not None:
        found = _find_updates(adapter, config, stored, plain, {}, ties)
        return found and Changes(found[0], {}, {}, plain, found[1], tokens)
    untied = untied_config(plain) if ties else plain
    found = _find_updates(adapter, config, stored, untied, copies, {})
    if found is None:
        return None
    updates, _ = found
    if ties.keys().isdisjoint(updates) and not any(source in updates for source in ties.values()):
        return Changes(updates, {}, {}, plain)
    return Changes(updates, ties, copies, untied)


def _find_updates(
    adapter: Path,
    config: Any,
    stored: StoredWeights,
    untied: PretrainedConfig,
    copies: Mapping[str, str],
    ties: Mapping[str, str],
) -> tuple[dict[str, Update], dict[str, Rows]] | None:
    model = meta_model(untied)
    owners = Owners(model)
    try:
        adapted = get_peft_model(model, config)
        expected = shapes_in_file(adapted)
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
            source = copies.get(name, name)
            is_plain = source in stored.files and stored.shape(source) == tuple(owned.shape)
            if not key or not is_plain or len(owners.of(owned)) > 1:
                return None
            updates[name] = Update(key, layout, layer.weights[parameter])
    rows = _find_rows(adapted, stored, ties)
    # What is trained besides the blocks, such as modules_to_save, takes the place of whole tensors.
    known = {update.key for update in updates.values()} | {own.key for own in rows.values()}
    return (updates, rows) if _repeats_base(adapter, expected.keys() - known, stored, copies) else None


def _find_rows(adapted: Any, stored: StoredWeights, ties: Mapping[str, str]) -> dict[str, Rows]:
    """The rows that are put into each stored tensor, also into one that is tied to such a tensor."""
    rows: dict[str, Rows] = {}
    for path, wrapper in adapted.named_modules():
        if not isinstance(wrapper, TrainableTokensWrapper) or wrapper.token_adapter.tied_adapter:
            continue
        name = f"{path.removeprefix('base_model.model.')}.weight"
        found = Rows(f"{path}.token_adapter.trainable_tokens_delta", wrapper.token_adapter.token_indices["default"])
        sharing = {name, *(target for target, source in ties.items() if source == name)}
        rows |= dict.fromkeys(sharing & stored.files.keys(), found)
    return rows


def _repeats_base(adapter: Path, keys: Collection[str], stored: StoredWeights, copies: Mapping[str, str]) -> bool:
    """Whether tensors of an adapter are the base's own, which PEFT saves along with adapted embeddings."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as tensors:
        for key in keys:
            path, own_layer, parameter = key.removeprefix("base_model.model.").rpartition(".base_layer.")
            name = f"{path}.{parameter}"
            source = copies.get(name, name)
            if not own_layer or source not in stored.files:
                return False
            saved = tensors.get_tensor(key)
            # It is as the model was trained, which may have been in another dtype.
            if not torch.equal(saved, stored.read([source])[source].to(saved.dtype)):
                return False
    return True


def base_digest_of(stored: StoredWeights, changes: Changes) -> str | None:
    """The digest of a model's stored weights at the diagonals that an adapter changes."""
    sources = {name: changes.copies.get(name, name) for name in changes.updates}
    return digest_of_base(
        (stored.read([sources[name]])[sources[name]], update.weight, update.layout)
        for name, update in changes.updates.items()
    )


def merge_shards(
    adapter: Path,
    stored: StoredWeights,
    changes: Changes,
    folder: Path,
    dtype: torch.dtype | None,
    console: Console | None = None,
) -> int:
    """Write each file of the base model with the blocks added, and read it back.

    Args:
        adapter: the adapter's folder.
        stored: the base model's files.
        changes: from :func:`find_changes`.
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
    updates, copies = changes.updates, changes.copies
    verified = 0
    shards = stored.shards

    def of_base(name: str) -> torch.Tensor:
        source = copies.get(name, name)
        tensor = _cast(stored.read([source])[source], name, dtype, kept)
        return tensor if changes.tokens is None or name not in changes.rows else with_rows(tensor, changes.tokens)

    with (
        safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as blocks,
        ProgressReport(console or Console(stderr=True), "merging files", len(shards)) as report,
    ):
        for number, (path, own) in enumerate(shards.items(), start=1):
            names = [*own, *(name for name, source in copies.items() if source in own)]
            merged = {name: of_base(name) for name in names}
            for name in names:
                if name in updates:
                    _add(name, merged[name], blocks.get_tensor(updates[name].key), updates[name], adapter)
                if name in changes.rows:
                    _put_rows(name, merged[name], changes.rows[name], blocks, adapter)
            write_tensors(merged, folder / path.name)
            del merged
            for name in names:
                wanted = of_base(name)
                if name in changes.rows:
                    _put_rows(name, wanted, changes.rows[name], blocks, adapter)
                _check_written(folder / path.name, name, wanted, updates.get(name), blocks)
                verified += 1
            report.update(number)
    write_index(folder, [path.name for path in shards])
    write_settings(folder, stored, dtype, changes.config, changes.tokens and changes.tokens.tokenizer)
    return verified


def _add(name: str, tensor: torch.Tensor, blocks: torch.Tensor, update: Update, adapter: Path) -> None:
    matrix = update.weight.matrix(tensor)
    write_to_diagonal(matrix, blocks, update.layout)
    if not all(bool(torch.isfinite(tile.of_weight(matrix)).all()) for tile in update.layout.tiles):
        raise UserError(
            f"The adapter {str(adapter)!r} cannot be merged: {name} would have NaN or infinite values; the adapter is "
            "broken, or its blocks overflow the weight's dtype."
        )


def _put_rows(name: str, tensor: torch.Tensor, rows: Rows, saved: Any, adapter: Path) -> None:
    values = saved.get_tensor(rows.key).to(tensor.dtype)
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"The adapter {str(adapter)!r} cannot be merged: rows of {name} would have NaN or infinite values; the "
            "adapter is broken, or its values overflow the weight's dtype."
        )
    tensor[rows.ids] = values


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
