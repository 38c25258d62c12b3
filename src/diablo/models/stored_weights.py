"""The weights of a model as they lie on disk, read tensor by tensor, without a model that holds them."""

from __future__ import annotations

import json
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig

from diablo.errors import UserError
from diablo.models.loading import (
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve_model,
    stop_token_ids,
    write_processor,
)
from diablo.records.results import write_json

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class NoSafetensorsError(UserError):
    """A model has no safetensors files."""


class StoredWeights:
    """The safetensors files of a model, those that transformers reads.

    A folder may hold the same weights once more under other names, as Mistral's do; these are not looked at.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.

    Attributes:
        name: a folder or hub id that transformers understands.
        config: the model's config.
        folder: where the files are.
        files: for each tensor, the file that holds it.

    Raises:
        NoSafetensorsError: the model has no such files.
        UserError: there is no such model, or a file cannot be read.
    """

    def __init__(self, model: str) -> None:
        self.name = resolve_model(model)
        self.config = load_config(self.name)
        self.folder = Path(self.name) if Path(self.name).is_dir() else _download(self.name)
        self.files = self._find(model)

    def _find(self, model: str) -> dict[str, Path]:
        # In the order in which transformers looks.
        if (self.folder / _WHOLE).is_file():
            with _open(self.folder / _WHOLE) as tensors:
                return dict.fromkeys(tensors.keys(), self.folder / _WHOLE)
        if (self.folder / _INDEX).is_file():
            try:
                index = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                files = {str(name): self.folder / Path(str(file)).name for name, file in index.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"model: {self.folder / _INDEX} cannot be read: {error}.") from None
            if absent := sorted({path.name for path in files.values() if not path.is_file()}):
                raise UserError(f"model: {str(self.folder)!r} lacks {', '.join(absent[:3])}, which its index names.")
            return files
        raise NoSafetensorsError(
            f"model: {model!r} has no .safetensors files; other formats are not read, since they run code."
        )

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    @property
    def shards(self) -> dict[Path, list[str]]:
        """The names of the tensors in each file, in the order of the files' names."""
        shards: dict[Path, list[str]] = {path: [] for path in sorted(set(self.files.values()))}
        for name, path in self.files.items():
            shards[path].append(name)
        return shards

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        with self._reading(self.files[name]) as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors as they are stored."""
        found: dict[str, torch.Tensor] = {}
        for path in sorted({self.files[name] for name in names}):
            with self._reading(path) as tensors:
                found |= {name: tensors.get_tensor(name) for name in names if self.files[name] == path}
        return found

    @contextmanager
    def _reading(self, path: Path) -> Generator[safe_open]:
        try:
            with _open(path) as tensors:
                yield tensors
        except SafetensorError as error:
            raise UserError(f"model: {path} does not hold what the index says: {error}.") from None


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole: it has its name only when nothing is missing.

    Raises:
        UserError: it cannot be written, such as on a full disk.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt", **(metadata or {})},
        )
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}; is the disk full?") from None
    temporary.replace(path)


def write_index(folder: Path, files: Sequence[str]) -> None:
    """Write which of a model's files holds which tensor, where it is not one file under the name of a whole model."""
    if list(files) == [_WHOLE]:
        return
    weight_map: dict[str, str] = {}
    for name in files:
        with _open(folder / name) as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), name)
    size = sum((folder / name).stat().st_size for name in files)
    write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_settings(
    folder: Path,
    stored: StoredWeights,
    dtype: torch.dtype | None = None,
    config: PretrainedConfig | None = None,
    tokenizer: Any = None,
) -> None:
    """Write a model's config, tokenizer and generation config, as they belong to weights that were made of another's.

    Args:
        folder: where to write.
        stored: the other model.
        dtype: dtype that the config is to state; the other's where None.
        config: the config; the other's where None.
        tokenizer: the tokenizer; the other's where None.
    """
    config = config or stored.config
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    (tokenizer or load_tokenizer(stored.name)).save_pretrained(folder)
    write_processor(stored.name, folder)
    if (stored.folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(stored.folder).save_pretrained(folder)


def write_stop_tokens(folder: Path, stops: Collection[int]) -> None:
    """Name tokens that stop generation in a stored model's generation config, behind those that it names already."""
    config = load_config(str(folder))
    generation = load_generation_config(str(folder)) or GenerationConfig.from_model_config(config)
    known = stop_token_ids(config, generation)
    generation.eos_token_id = [*known, *sorted(set(stops) - set(known))]
    generation.save_pretrained(folder)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"model: {path} cannot be read: {error}; it is truncated or no safetensors file.") from None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", "*.json"]))
    except Exception as error:  # what a hub, a proxy or a cache can raise is open-ended
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"model: the weights of {name!r} cannot be had from the hub ({reason}).") from None
