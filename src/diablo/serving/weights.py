"""The model's weights, into which the blocks of one adapter at a time are written, and adapters that fit them."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diablo.devices import wait_for
from diablo.errors import UserError, first_line
from diablo.models.adapters import check_tensors, read_adapter_config
from diablo.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diablo.ops.sweep import Diagonals, DiagonalSweep
from diablo.tuner.base_digest import digest_of_base, is_same_base
from diablo.tuner.config import DiabloConfig
from diablo.tuner.targets import Target, resolve_targets
from diablo.tuner.weights import Owners, Weight, is_quantized, module_weight, parameter_weight

# What an adapter may train beside blocks, which are all that is written into weights here.
_BESIDE = ("modules_to_save", "trainable_token_indices", "layer_replication")


@dataclass(frozen=True)
class Blocks:
    """The values of an adapter that fits the model.

    Attributes:
        targets: what it adapts.
        tensors: the blocks of each target, of its layout's ``blocks_shape``, in the dtype of the file.
    """

    targets: tuple[Target, ...]
    tensors: tuple[torch.Tensor, ...]

    @property
    def bytes(self) -> int:
        """The memory that they take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def on(self, device: torch.device) -> Blocks:
        """The same on a device; tensors that are there already are not copied."""
        moved = tuple(tensor.to(device, non_blocking=True) for tensor in self.tensors)
        return Blocks(self.targets, moved)

    def pinned(self) -> Blocks:
        """The same in memory that a GPU can read by itself."""
        return Blocks(self.targets, tuple(tensor.pin_memory() for tensor in self.tensors))


class Weights:
    """The weights of a model that serves, and what stands in them.

    Args:
        model: a model without adapters, in evaluation mode, on its device.
        name: what it is called, for messages.

    Attributes:
        written: what stands in the weights now; None for the base values.
        switches: how often that has changed.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.device: torch.device = model.device
        self.written: DiagonalSweep | None = None
        self.switches = 0
        self._owners = Owners(model)
        self._resolved: dict[bytes, tuple[Target, ...]] = {}
        self._digests: dict[tuple[Target, ...], str | None] = {}
        # One sweep of each set of targets keeps the memory for base values that all of them share.
        self._first: dict[tuple[Target, ...], DiagonalSweep] = {}

    def read(self, folder: Path) -> Blocks:
        """Read an adapter whose blocks can be written into these weights.

        Args:
            folder: the adapter's folder.

        Raises:
            UserError: it cannot be read, is of another method or base model, trains more than blocks, or lacks tensors.
        """
        targets = self.targets(folder)
        names = {_name_in_file(target): target for target in targets}
        check_tensors(folder, self.name, {name: target.layout.blocks_shape for name, target in names.items()})
        try:
            tensors = load_file(folder / ADAPTER_WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {first_line(error)}.") from None
        values = tuple(tensors[name] for name in names)
        if not all(bool(torch.isfinite(own).all()) for own in values):
            raise UserError(f"The adapter {str(folder)!r} has values that are not finite; take another checkpoint.")
        return Blocks(targets, values)

    def sweep(self, blocks: Blocks) -> DiagonalSweep:
        """What writes an adapter's blocks into the weights.

        Args:
            blocks: the blocks, on the model's device.
        """
        diagonals: list[tuple[torch.Tensor, Diagonals]] = [
            (self._reading(target).matrix(self.weight(target).detach()), {target.layout: [own]})
            for target, own in zip(blocks.targets, blocks.tensors, strict=True)
        ]
        with self.at_base():
            sweep = DiagonalSweep(diagonals, like=self._first.get(blocks.targets))
        self._first.setdefault(blocks.targets, sweep)
        return sweep

    def put(self, sweep: DiagonalSweep | None) -> None:
        """Have an adapter's blocks in the weights and nothing else; with None, the base values, to the bit."""
        if sweep is self.written:
            return
        self._change(sweep)
        wait_for(self.device)
        self.switches += 1

    @contextmanager
    def at_base(self) -> Generator[None]:
        """Have the base values in the weights meanwhile."""
        written = self.written
        self._change(None)
        try:
            yield
        finally:
            self._change(written)

    @torch.no_grad()
    def _change(self, sweep: DiagonalSweep | None) -> None:
        if self.written is not None:
            self.written.restore()
            self.written = None
        if sweep is not None:
            self.written = sweep
            sweep.write()

    def targets(self, folder: Path) -> tuple[Target, ...]:
        """What an adapter adapts; its settings alone are read.

        Raises:
            UserError: see :meth:`read`.
        """
        # Many adapters have the same settings, and to look through a model's modules takes as long as a forward.
        settings = folder / ADAPTER_CONFIG
        text = settings.read_bytes() if settings.is_file() else b""
        if text not in self._resolved:
            self._resolved[text] = self._targets(folder)
        return self._resolved[text]

    def _targets(self, folder: Path) -> tuple[Target, ...]:
        config = read_adapter_config(folder)
        where = f"The adapter {str(folder)!r}"
        if not isinstance(config, DiabloConfig):
            method = str(getattr(config.peft_type, "value", config.peft_type))
            raise UserError(
                f"{where} is one of {method}, and diablo serve takes DiaBlo's alone; merge it with diablo merge, and "
                "serve the merged model."
            )
        beside = [key for key in _BESIDE if getattr(config, key)] + (["bias"] if config.bias != "none" else [])
        if beside:
            raise UserError(
                f"{where} has {', '.join(beside)}, and diablo serve takes adapters of blocks alone; merge it with "
                "diablo merge, and serve the merged model."
            )
        try:
            targets = tuple(resolve_targets(self.model, copy.deepcopy(config)))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} does not fit {self.name!r}: {first_line(error)}") from None
        for target in targets:
            if (obstacle := self._obstacle(target)) is not None:
                raise UserError(f"{where} adapts {target.name}, {obstacle}")
        if is_same_base(config.base_digest, self._digest(targets)) is False:
            raise UserError(
                f"{where} was made for base weights that differ at its targets from those of {self.name!r}; serve the "
                "model that it was trained on, in the revision of that time."
            )
        return targets

    def _obstacle(self, target: Target) -> str | None:
        """Why blocks cannot be written into a weight, with what to do; None where they can."""
        if is_quantized(self.model.get_submodule(target.module)):
            return "whose weight is quantized; merge it with diablo merge, and serve the merged model."
        if len(owners := self._owners.of(self.weight(target))) > 1:
            return f"whose weight is that of {' and '.join(owners)}; merge it, and serve the merged model."
        return None

    def _digest(self, targets: tuple[Target, ...]) -> str | None:
        if targets not in self._digests:
            with self.at_base():
                self._digests[targets] = digest_of_base(
                    (self.weight(target), self._reading(target), target.layout) for target in targets
                )
        return self._digests[targets]

    def weight(self, target: Target) -> torch.Tensor:
        """The weight of a target, with what stands in it now."""
        weight: Any = self.model.get_submodule(target.module)._parameters[target.parameter or "weight"]
        return weight

    def _reading(self, target: Target) -> Weight:
        module = self.model.get_submodule(target.module)
        return module_weight(module) if target.parameter is None else parameter_weight(module, target.parameter)


def _name_in_file(target: Target) -> str:
    own = f".{target.parameter}" if target.parameter is not None else ""
    return f"base_model.model.{target.module}.diablo_blocks{own}"
