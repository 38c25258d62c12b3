"""The quantization of a whole model, one block (decoder layer) after the other.

Only the weights of one block are in memory at a time, and finished blocks are kept on the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from rich.console import Console
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from diablo.devices import choose_device, choose_dtype
from diablo.errors import UserError
from diablo.models.folders import check_new_folder
from diablo.models.forms import ENCODER_DECODER, IMAGE_TEXT, form_of
from diablo.models.stored_weights import StoredWeights, write_index, write_settings, write_tensors
from diablo.quantization.scheme import Scheme
from diablo.quantization.weights import check_library, dequantize, quantize_weight
from diablo.records.progress import ProgressReport
from diablo.records.results import changed_settings, describe_versions, write_json

_ROWS_TOGETHER = 8


@dataclass(frozen=True)
class QuantizationReport:
    """The outcome of quantizing a model.

    Attributes:
        folder: where the quantized model is.
        errors: the relative error of each layer's outputs on the calibration text, by the layer's name.
        bytes_before: size of the original weights, in bytes.
        bytes_after: size of the quantized weights, in bytes.
    """

    folder: Path
    errors: dict[str, float]
    bytes_before: int
    bytes_after: int


def quantize_model(
    model: str, folder: Path, scheme: Scheme, calibration: torch.Tensor, *, console: Console | None = None
) -> QuantizationReport:
    """Quantize the linear layers of a model's blocks, and write the model in the GPTQ format.

    Each block is calibrated on the outputs of the quantized blocks before it. Embeddings, norms and the output layer
    stay as they are. Finished blocks are written to the folder ``OUT.partial``, where ``OUT`` is ``folder``. A call
    that was interrupted goes on from there.

    Args:
        model: a folder, a hub id or ``builtin:NAME``.
        folder: where to write. It must be empty or not exist, and it is never left half written.
        scheme: what to quantize to.
        calibration: token ids ``(rows, length)``, from :func:`~diablo.quantization.calibration.calibration_rows`.
        console: where progress is written; standard error where None.

    Raises:
        UserError: the model cannot be quantized with this scheme, ``folder`` has files, gptqmodel is missing, or
            ``OUT.partial`` was made by something else or with other settings.
    """
    check_library()
    check_new_folder(folder, "quantized model")
    source = StoredWeights(model)
    if getattr(source.config, "quantization_config", None) is not None:
        raise UserError(f"model: {model!r} is quantized already; give the model that it was made from.")
    if form_of(source.config) == ENCODER_DECODER:
        raise UserError(
            f"model: {model!r} is an encoder-decoder, whose blocks are in two lists; give a causal language model."
        )
    if form_of(source.config) is IMAGE_TEXT:
        raise UserError(
            f"model: {model!r} sees images, and diablo quantize takes models of text alone; set quantization: nf4 in a "
            "recipe, which quantizes it while it is loaded."
        )
    device = choose_device()
    skeleton = _Skeleton(source, choose_dtype("auto", device), device)
    skeleton.check(scheme)
    partial = folder.with_name(f"{folder.name}.partial")
    digest = hashlib.sha256(calibration.numpy().tobytes()).hexdigest()
    _open_partial(partial, {"model": model, **asdict(scheme), "calibration": digest})

    count = len(skeleton.blocks)
    files = [f"model-{number:05}-of-{count + 1:05}.safetensors" for number in range(1, count + 2)]
    hidden = skeleton.inputs_of_blocks(calibration)
    with ProgressReport(console or Console(stderr=True), "quantizing blocks", count) as report:
        for index in range(count):
            path = partial / files[index]
            with skeleton.block(index) as block:
                if path.is_file():
                    _load_quantized(block, path, skeleton.prefix(index), scheme)
                else:
                    _quantize_block(block, skeleton.prefix(index), hidden, scheme, path)
                hidden = [skeleton.run(block, *inputs) for inputs in hidden]
            report.update(index + 1)
    write_tensors(source.read(skeleton.outer), partial / files[-1])
    write_index(partial, files)
    errors = _errors_of(partial, files)
    _write_settings(partial, source, scheme, errors)
    (partial / "settings.json").unlink()
    if folder.is_dir():
        folder.rmdir()
    partial.rename(folder)
    after = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return QuantizationReport(folder, errors, source.bytes, after)


class _Skeleton:
    """The model with only the weights outside of its blocks. A block gets its weights while it is worked on.

    Args:
        source: the model's files.
        dtype: dtype of the activations.
        device: where blocks are run.
    """

    def __init__(self, source: StoredWeights, dtype: torch.dtype, device: torch.device) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(source.config, dtype=dtype).eval()
        self.blocks = _blocks_of(self.model)
        # Stored tensors that transformers ignores too: old checkpoints have rotary frequencies, which are computed now.
        self._ignored = {*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"}
        name = next(name for name, module in self.model.named_modules() if module is self.blocks)
        self._stem = f"{name}."
        self.outer = [name for name in source.files if not name.startswith(self._stem)]
        self._put(self.model, source.read(self.outer), "")
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(device)

    def prefix(self, index: int) -> str:
        """The start of the names of a block's tensors."""
        return f"{self._stem}{index}."

    def check(self, scheme: Scheme) -> None:
        """Check that every layer can be quantized.

        Raises:
            UserError: one cannot.
        """
        for name, layer in linear_layers(self.blocks):
            scheme.check(name, layer)

    def block(self, index: int) -> _Loaded:
        """A context in which a block has its weights."""
        return _Loaded(self, index)

    def _put(self, module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
        known = set(dict(module.named_parameters(remove_duplicate=False))) | set(dict(module.named_buffers()))
        for full_name, tensor in tensors.items():
            owner_name, _, leaf = full_name.removeprefix(prefix).rpartition(".")
            if full_name.removeprefix(prefix) not in known:
                if any(re.search(pattern, full_name) for pattern in self._ignored):
                    continue
                raise UserError(f"model: {self.source.name!r} stores a tensor {full_name}, for which it has no module.")
            owner = module.get_submodule(owner_name)
            moved = tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            if leaf in owner._parameters:
                owner._parameters[leaf] = nn.Parameter(moved, requires_grad=False)
            else:
                owner._buffers[leaf] = moved

    @torch.no_grad()
    def inputs_of_blocks(self, calibration: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """The arguments of the first block for each batch of calibration rows: hidden states, and keyword arguments."""
        caught: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
            raise _Reached

        handle = self.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for rows in calibration.split(_ROWS_TOGETHER):
                try:
                    self.model(input_ids=rows.to(self.device), use_cache=False)
                except _Reached:
                    continue
        finally:
            handle.remove()
        return caught

    @torch.no_grad()
    def run(
        self, block: nn.Module, hidden: torch.Tensor, settings: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """A block's outputs, and the keyword arguments: together they are the arguments of the next block."""
        output = block(hidden, **settings)
        return (output[0] if isinstance(output, tuple) else output), settings


class _Reached(Exception):  # noqa: N818 - no error
    """Ends a forward at the first block, when its arguments are known."""


class _Loaded:
    """A context in which a block has its weights. They are dropped at the end."""

    def __init__(self, skeleton: _Skeleton, index: int) -> None:
        self.skeleton, self.index = skeleton, index

    def __enter__(self) -> nn.Module:
        prefix = self.skeleton.prefix(self.index)
        names = [name for name in self.skeleton.source.files if name.startswith(prefix)]
        block = self.skeleton.blocks[self.index]
        self.skeleton._put(block, self.skeleton.source.read(names), prefix)
        missing = [name for name, parameter in block.named_parameters() if parameter.is_meta]
        if missing:
            raise UserError(f"model: {self.skeleton.source.name!r} stores no tensor {prefix}{missing[0]}.")
        return block

    def __exit__(self, *exc: object) -> None:
        self.skeleton.blocks[self.index].to("meta")


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a module, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            yield name, layer


def _blocks_of(model: Any) -> nn.ModuleList:
    decoder, config = model.get_decoder(), model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1:
        # Each kind of block has a mask of its own, but all blocks are called here with the first block's arguments.
        raise UserError(
            f"model: its blocks are of several kinds ({', '.join(kinds)}); those of one kind can be quantized."
        )
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    lists = [child for child in lists if len(child) == config.num_hidden_layers]
    if len(lists) != 1 or not any(True for _ in linear_layers(lists[0])):
        raise UserError(
            f"model: the blocks of a {type(model).__name__} cannot be told from the rest, or have no linear layers; "
            "models with a list of num_hidden_layers blocks of nn.Linear can be quantized."
        )
    return lists[0]


@torch.no_grad()
def _quantize_block(
    block: nn.Module, prefix: str, hidden: list[tuple[torch.Tensor, dict[str, Any]]], scheme: Scheme, path: Path
) -> None:
    """Quantize a block's linear layers, and write the block's file. The layers then compute with what is stored."""
    started = time.perf_counter()
    grams = _grams(block, hidden)
    tensors = {f"{prefix}{name}": value for name, value in block.state_dict().items()}
    errors = {}
    for name, layer in linear_layers(block):
        if name not in grams:
            raise UserError(f"{prefix}{name} is reached by no calibration text; give more of it.")
        found = quantize_weight(layer.weight.float(), layer.bias, grams[name], scheme)
        layer.weight.copy_(found.weight)
        for kind in ("weight", "bias"):
            tensors.pop(f"{prefix}{name}.{kind}", None)
        tensors |= {f"{prefix}{name}.{kind}": value for kind, value in found.tensors.items()}
        errors[f"{prefix}{name}"] = found.error
    seconds = round(time.perf_counter() - started, 2)
    write_tensors(tensors, path, {"errors": json.dumps(errors), "seconds": str(seconds)})


def _grams(block: nn.Module, hidden: list[tuple[torch.Tensor, dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """For each linear layer the sum of ``x x^T`` over its inputs. Layers with the same input share one tensor."""
    grams: dict[str, torch.Tensor] = {}
    latest: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(name: str, inputs: torch.Tensor) -> None:
        # Neighbouring layers, such as the projections for query, key and value, are called with the same tensor.
        if not (latest and latest[0][0] is inputs):
            flat = inputs.flatten(0, -2).float()
            latest[:] = [(inputs, flat.T @ flat)]
        grams[name] = grams[name] + latest[0][1] if name in grams else latest[0][1]

    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
        for name, layer in linear_layers(block)
    ]
    try:
        for inputs, settings in hidden:
            block(inputs, **settings)
    finally:
        for handle in handles:
            handle.remove()
    return grams


@torch.no_grad()
def _load_quantized(block: nn.Module, path: Path, prefix: str, scheme: Scheme) -> None:
    """Give a block's linear layers the weights that an earlier call stored."""
    with safe_open(path, framework="pt") as stored:
        names = list(stored.keys())
        for name, layer in linear_layers(block):
            stem = f"{prefix}{name}."
            tensors = {each.removeprefix(stem): stored.get_tensor(each) for each in names if each.startswith(stem)}
            layer.weight.copy_(dequantize(tensors, scheme))


def _open_partial(partial: Path, settings: dict[str, Any]) -> None:
    path = partial / "settings.json"
    if path.is_file():
        changed = changed_settings(json.loads(path.read_text(encoding="utf-8")), settings)
        if changed:
            raise UserError(
                f"{', '.join(changed)}: changed since the quantization in {str(partial)!r} was started; set them back, "
                "or delete that folder."
            )
        return
    if partial.exists():
        raise UserError(f"{str(partial)!r} has files of something else; delete it, or give another folder.")
    partial.mkdir(parents=True)
    write_json(path, settings)


def _errors_of(folder: Path, files: list[str]) -> dict[str, float]:
    """The layers' errors by name. Each block's file has those of its layers in its metadata."""
    errors: dict[str, float] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as tensors:
            errors |= json.loads((tensors.metadata() or {}).get("errors", "{}"))
    return errors


def _write_settings(folder: Path, source: StoredWeights, scheme: Scheme, errors: dict[str, float]) -> None:
    source.config.quantization_config = scheme.config()
    write_settings(folder, source)
    record = {"model": source.name, **asdict(scheme), "versions": describe_versions(), "errors": errors}
    write_json(folder / "quantization.json", record)
