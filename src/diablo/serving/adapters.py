"""The adapters that a server knows: in the weights, on the device, in memory or on disk, and their coming and going."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

from diablo.devices import can_pin_memory
from diablo.errors import UserError
from diablo.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder, is_adapter
from diablo.ops.sweep import DiagonalSweep
from diablo.serving.beside import can_stand_beside
from diablo.serving.weights import Blocks, Weights
from diablo.tuner.targets import Target

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int], ...]
_NUMBERS = itertools.count()


@dataclass(eq=False)
class Adapter:
    """An adapter as it was when it was added. One that takes its place under the same name is another object.

    Attributes:
        name: what requests call it.
        folder: its folder.
        stamp: what its files were then: for each the inode, the size in bytes and the time of its last change.
        is_found: whether it was found in the watched folder.
        fault: why it cannot be used, once that was found out.
        group: what it adapts, where rows of it can share a batch with rows of others that adapt the same; else None.
        is_looked_at: whether that was found out.
        number: counts all adapters of the process.
    """

    name: str
    folder: Path
    stamp: Stamp
    is_found: bool = False
    fault: str | None = None
    group: tuple[Target, ...] | None = None
    is_looked_at: bool = False
    number: int = field(default_factory=lambda: next(_NUMBERS))


class Kept(Generic[T]):
    """Values that are kept as long as there is room, those that were not used for longest being dropped first.

    Args:
        most: what all of them together may measure.
        measure: the measure of a value.
        dropped: called with the key of each value that is no longer kept.
    """

    def __init__(
        self, most: int, measure: Callable[[T], int], dropped: Callable[[Hashable], None] = lambda _: None
    ) -> None:
        self.most, self._measure, self._dropped = most, measure, dropped
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> T | None:
        """A value, which counts as used now; None where it is not kept."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Hashable, value: T) -> None:
        """Keep a value, which is kept even where it alone is more than there is room for."""
        self.drop(key)
        self._values[key] = value
        self.size += self._measure(value)
        while self.size > self.most and len(self._values) > 1:
            self.drop(next(iter(self._values)))

    def drop(self, key: Hashable) -> None:
        """Keep a value no longer; nothing happens where it is not kept."""
        if (value := self._values.pop(key, None)) is not None:
            self.size -= self._measure(value)
            self._dropped(key)


class Adapters:
    """The adapters of a server by name. Any thread may ask; the engine's thread alone reads and places them.

    Args:
        weights: the model's weights.
        memory: the bytes that adapters may take in the host's memory. The others wait on disk.
        hot: how many adapters stay on the GPU beside the model; on a CPU these are those in memory.
        folder: a folder whose sub-folders are adapters, by the names that they have there; None for none.
    """

    def __init__(self, weights: Weights, memory: int, hot: int = 8, folder: Path | None = None) -> None:
        self.weights = weights
        self._folder = folder
        self._known: dict[str, Adapter] = {}
        self._lock = Lock()
        self._on_gpu = weights.device.type != "cpu"
        self._placed: Kept[DiagonalSweep] = Kept(hot if self._on_gpu else sys.maxsize, lambda _: 1)
        # On a CPU what is placed is what is in memory.
        self._read: Kept[Blocks] = Kept(memory, lambda blocks: blocks.bytes, dropped=self._placed.drop)
        self._seen: dict[str, Stamp] = {}
        self._can_mix: dict[tuple[Target, ...], bool] = {}
        self.loads = 0

    def known(self) -> list[Adapter]:
        """All adapters, by name."""
        with self._lock:
            return [self._known[name] for name in sorted(self._known)]

    def get(self, name: str) -> Adapter | None:
        """The adapter that has a name now."""
        with self._lock:
            return self._known.get(name)

    @property
    def in_memory(self) -> tuple[int, int]:
        """How many adapters are in the host's memory, and their bytes."""
        return len(self._read), self._read.size

    def add(self, name: str, folder: Path, *, replace: bool = False) -> Adapter:
        """Read an adapter, check it and give it a name. To be called by the engine's thread.

        Args:
            name: the name.
            folder: its folder, or that of a run.
            replace: whether another adapter may have the name, which then loses it.

        Raises:
            UserError: the name is taken, or the adapter cannot be used.
        """
        if not replace and self.get(name) is not None:
            raise UserError(f"There is an adapter {name!r} already; unload it first, or replace it.")
        own = adapter_folder(folder)
        adapter = Adapter(name, own, _stamp(own))
        self._read.put(adapter, self._blocks(adapter))
        self._register(adapter)
        return adapter

    def remove(self, name: str) -> Adapter | None:
        """Take an adapter's name away. Requests that were accepted before are answered all the same."""
        with self._lock:
            return self._known.pop(name, None)

    def look(self) -> tuple[list[Adapter], list[str]]:
        """Look into the watched folder for adapters that have come, changed or gone.

        An adapter counts when its files have been the same in two looks, so that none is taken half copied. It is read
        when it is first asked for.

        Returns:
            Those that came or changed, and the names of those that went.
        """
        if self._folder is None:
            return [], []
        found: dict[str, tuple[Path, Stamp]] = {}
        for path in _folders_in(self._folder):
            if is_adapter(path) and (stamp := _stamp(own := adapter_folder(path))):
                found[path.name] = own, stamp
        settled = {name: (own, stamp) for name, (own, stamp) in found.items() if self._seen.get(name) == stamp}
        self._seen = {name: stamp for name, (_, stamp) in found.items()}
        came = []
        for name, (own, stamp) in settled.items():
            present = self.get(name)
            # What a name was given to by hand keeps it.
            if present is None or (present.is_found and present.stamp != stamp):
                came.append(Adapter(name, own, stamp, is_found=True))
                self._register(came[-1])
        gone = [each.name for each in self.known() if each.is_found and each.name not in found]
        for name in gone:
            self.remove(name)
        return came, gone

    def place(self, adapter: Adapter | None) -> DiagonalSweep | None:
        """What writes an adapter into the weights, read from disk where it has to be. For the engine's thread.

        Args:
            adapter: the adapter; None for the base model.

        Raises:
            UserError: the adapter cannot be used, or its files have changed before it was read.
        """
        if adapter is None:
            return None
        blocks, sweep = self.blocks(adapter), self._placed.get(adapter)
        if sweep is None:
            sweep = self.weights.sweep(blocks.on(self.weights.device))
            self._placed.put(adapter, sweep)
        return sweep

    def blocks(self, adapter: Adapter) -> Blocks:
        """The values of an adapter in the host's memory, read from disk where they have to be. For the engine's thread.

        Raises:
            UserError: see :meth:`place`.
        """
        if adapter.fault is not None:
            raise UserError(adapter.fault)
        blocks = self._read.get(adapter)
        if blocks is None:
            self._check_unchanged(adapter)
            try:
                blocks = self._blocks(adapter)
            except UserError as fault:
                adapter.fault = str(fault)
                raise
            self._read.put(adapter, blocks)
        return blocks

    def look_at(self, adapter: Adapter) -> None:
        """Find out with which others an adapter can share a batch. For the engine's thread."""
        if adapter.is_looked_at:
            return
        adapter.is_looked_at = True
        # What is wrong with an adapter is told when its turn comes.
        with suppress(UserError, OSError):
            blocks = self._read.get(adapter)
            if blocks is None:
                self._check_unchanged(adapter)
            targets = self.weights.targets(adapter.folder) if blocks is None else blocks.targets
            if targets not in self._can_mix:
                with self.weights.at_base():
                    self._can_mix[targets] = can_stand_beside(self.weights, targets)
            adapter.group = targets if self._can_mix[targets] else None

    def _check_unchanged(self, adapter: Adapter) -> None:
        if _stamp(adapter.folder) != adapter.stamp:
            raise UserError(
                f"The adapter {adapter.name!r} is no longer on disk as it was when the request came; ask again."
            )

    def _blocks(self, adapter: Adapter) -> Blocks:
        blocks = self.weights.read(adapter.folder)
        self.loads += 1
        return blocks.pinned() if self._on_gpu and can_pin_memory(self.weights.device) else blocks

    def _register(self, adapter: Adapter) -> None:
        with self._lock:
            self._known[adapter.name] = adapter


def _folders_in(folder: Path) -> Iterable[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []


def _stamp(folder: Path) -> Stamp:
    """What tells whether an adapter's files have changed; empty where one of them is not there."""
    try:
        found = [(folder / name).stat() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    except OSError:
        return ()
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)
