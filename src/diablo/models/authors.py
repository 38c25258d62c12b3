"""The checkpoints of the paper's authors, turned into PEFT adapters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from diablo.errors import UserError
from diablo.layout import BlockLayout
from diablo.models.folders import ADAPTER_WEIGHTS, new_folder
from diablo.models.loading import load_config, meta_model, resolve_model
from diablo.tuner import DiabloConfig
from diablo.tuner.targets import linear_kinds
from diablo.tuner.weights import linear_shape

SUFFIX = ".block_A"


@dataclass(frozen=True)
class ImportReport:
    """The outcome of an import.

    Attributes:
        folder: where the adapter is.
        modules: number of modules that it adapts.
        parameters: number of entries of all its blocks.
        num_blocks: N as the adapter's config has it. Where modules differ, the config has other N for some of them.
    """

    folder: Path
    modules: int
    parameters: int
    num_blocks: int


def import_checkpoint(path: Path, folder: Path, *, base: str) -> ImportReport:
    """Turn an ``adapter.chkpt`` of the paper's authors into the folder of a PEFT adapter. No value changes.

    The authors' file is a dict from ``<module>.block_A`` to tensors ``(N_eff, d1, d2)`` with d1 along the input. These
    are our blocks.

    Args:
        path: the file. Nothing in it is executed.
        folder: where to write. It must be empty or not exist, and it is never left half written.
        base: folder, hub id or builtin name of the base model. Only its config is read.

    Raises:
        UserError: the file is no such checkpoint, it does not fit the base model, or ``folder`` has files.
    """
    with new_folder(folder, "adapter") as target:
        config, blocks = _converted(path, base)
        config.save_pretrained(str(target))
        tensors = {f"base_model.model.{name}.diablo_blocks": tensor.contiguous() for name, tensor in blocks.items()}
        save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    return ImportReport(folder, len(blocks), sum(tensor.numel() for tensor in blocks.values()), config.num_blocks)


def _converted(path: Path, base: str) -> tuple[DiabloConfig, dict[str, torch.Tensor]]:
    """The config that fits a checkpoint's blocks on a base model, and the blocks by the name of their module."""
    blocks = _read(path)
    model = meta_model(load_config(resolve_model(base)))
    choices = {name: _fitting(model, name, tensor) for name, tensor in blocks.items()}
    # Several N can make blocks of one shape. An N that fits all modules makes the simplest config. Among several such N
    # powers of two are preferred, and then the largest.
    common = set.intersection(*(set(fitting) for fitting in choices.values()))
    frequent = Counter(number for fitting in choices.values() for number in fitting).most_common(1)[0][0]
    num_blocks = max(common, key=lambda number: (number & (number - 1) == 0, number)) if common else frequent
    kinds = Counter(name.rpartition(".")[2] for name in blocks)
    all_kinds = linear_kinds(model)
    whole = all(all_kinds[kind] == count for kind, count in kinds.items())
    config = DiabloConfig(
        num_blocks=num_blocks,
        block_pattern={
            name.replace(".", r"\."): fitting[0] for name, fitting in choices.items() if num_blocks not in fitting
        },
        target_modules=sorted(kinds) if whole else sorted(blocks),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return config, blocks


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{str(path)!r} is no file; give the authors' adapter.chkpt.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can raise any error in torch's reader.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{str(path)!r} cannot be read: {reason} It is damaged, or holds more than tensors, which is not executed."
        ) from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, not a dict of <module>{SUFFIX} to tensors.")
    for key, value in content.items():
        if not isinstance(key, str) or not key.endswith(SUFFIX) or key == SUFFIX:
            raise UserError(f"{str(path)!r} has the key {key!r}; allowed are names of modules followed by {SUFFIX}.")
        if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"{str(path)!r}: {key} is {found}; allowed are floating tensors of (blocks, d_in, d_out).")
        if not torch.isfinite(value).all():
            raise UserError(f"{str(path)!r}: {key} has NaN or infinite values; the training that wrote it failed.")
    return {key.removesuffix(SUFFIX): value.detach() for key, value in content.items()}


def _fitting(model: nn.Module, name: str, tensor: torch.Tensor) -> list[int]:
    """Every N with which the module's blocks have the tensor's shape."""
    try:
        shape = linear_shape(model.get_submodule(name))
    except AttributeError:
        shape = None
    if shape is None:
        raise UserError(
            f"{name}{SUFFIX} names no linear layer of {type(model).__name__}, which has "
            f"{', '.join(linear_kinds(model))}; give the base model that the checkpoint was trained on."
        )
    numbers = range(1, min(shape) + 1)
    fitting = [number for number in numbers if BlockLayout(*shape, number).blocks_shape == tuple(tensor.shape)]
    if not fitting:
        raise UserError(
            f"{name}{SUFFIX} has shape {tuple(tensor.shape)}, which no number of blocks gives for a layer of "
            f"{shape[0]} -> {shape[1]}; give the base model that the checkpoint was trained on."
        )
    return fitting
