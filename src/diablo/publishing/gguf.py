"""GGUF files for llama.cpp and all that is built on it, made by llama.cpp's own converter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from diablo.errors import UserError
from diablo.models.builtin import PREFIX, builtin_model
from diablo.models.folders import adapter_folder, base_model_of, is_adapter
from diablo.records.results import recipe_of_run

OUT_TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
_HOW_TO_GET = (
    "get it with: git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install 'diablo-peft[export]', and "
    f"give the folder as --llama-cpp llama.cpp, or in the environment variable {VARIABLE}"
)


@dataclass(frozen=True)
class GgufReport:
    """What was written, as it was read back.

    Attributes:
        path: the file.
        architecture: what llama.cpp calls the architecture.
        tensors: how many tensors there are.
        parameters: how many values they have.
        bytes: the file's size.
    """

    path: Path
    architecture: str
    tensors: int
    parameters: int
    bytes: int


def check_out_type(out_type: str) -> None:
    """Check the type of the weights in a file.

    Raises:
        UserError: it is none of :data:`OUT_TYPES`.
    """
    if out_type not in OUT_TYPES:
        raise UserError(
            f"--outtype: found {out_type!r}; allowed: {', '.join(OUT_TYPES)}. For fewer bits, give one of these files "
            "to llama.cpp's llama-quantize."
        )


def find_converter(folder: Path | None) -> Path:
    """llama.cpp's converter: in a folder, else where LLAMA_CPP says, else on the PATH.

    Args:
        folder: llama.cpp's folder, or the converter itself; None where the user gave none.

    Raises:
        UserError: it is not there.
    """
    given = {"--llama-cpp": folder, VARIABLE: os.environ.get(VARIABLE)}
    for key, place in given.items():
        if not place:
            continue
        path = Path(place)
        path = path / SCRIPT if path.is_dir() else path
        if path.is_file() and path.name == SCRIPT:
            return path.resolve()
        raise UserError(f"{key}: found {str(place)!r}, where there is no {SCRIPT} of llama.cpp; {_HOW_TO_GET}.")
    if found := shutil.which(SCRIPT):
        return Path(found)
    raise UserError(f"{SCRIPT} of llama.cpp is not found; {_HOW_TO_GET}.")


def check_plain(source: str, base: str | None) -> None:
    """Check that a model is there to be exported, as it is or merged, before anything is done.

    Args:
        source: see :func:`plain_model`.
        base: see there.

    Raises:
        UserError: there is neither a model nor an adapter, the adapter has to be merged with a choice, or a base model
            is given where there is a model already.
    """
    if (folder := _model_folder(source)) is not None:
        if base is not None:
            raise UserError(f"--base: {str(folder)!r} is a whole model, into which nothing is merged; leave it out.")
        return
    adapter = adapter_folder(source) if is_adapter(source) else None
    if adapter is None:
        raise UserError(
            f"{source!r} holds neither an adapter nor a model (config.json and *.safetensors); give a run's folder, or "
            "that of an adapter or a merged model."
        )
    # They import torch, for which nothing that is refused before is to wait.
    from diablo.models.loading import load_config, resolve_model, stored_quantization

    if recipe_of_run(adapter).get("quantization") or stored_quantization(
        load_config(resolve_model(base_model_of(adapter)))
    ):
        raise UserError(
            f"{source!r} was trained over quantized weights, so that merging changes what it computes; merge it first, "
            f"with: diablo merge {source} merged --into dequantized, and export that."
        )


@contextmanager
def plain_model(source: str, scratch: Path, *, base: str | None, console: Console | None) -> Generator[Path]:
    """The folder of a plain model: the one that is given, or an adapter's, merged for as long as the context lasts.

    Args:
        source: a run's folder, an adapter's, a model's, or the name of a builtin model.
        scratch: a folder on a disk with room for the merged model.
        base: base model to use in place of the one that the adapter names.
        console: where progress is written; standard error where None.
    """
    if (folder := _model_folder(source)) is not None:
        yield folder
        return
    # It imports torch, for which nothing that is refused before is to wait.
    from diablo.merging import merge_adapter

    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        folder = Path(temporary) / "merged"
        merge_adapter(adapter_folder(source), folder, base=base, console=console)
        yield folder


def write_gguf(model: Path, path: Path, converter: Path, *, out_type: str = "auto", name: str) -> GgufReport:
    """Convert a model. The file is never half written, and is read back.

    Args:
        model: the folder of a plain transformers model.
        path: the file; it is replaced where it is there.
        converter: what :func:`find_converter` found.
        out_type: the type of the weights, one of :data:`OUT_TYPES`; ``auto`` is ``bf16`` for a model
            in bf16 and ``f16`` otherwise.
        name: the model's name in the file.

    Raises:
        UserError: the converter fails, or its file cannot be read.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / "model.gguf"
        command = [sys.executable, str(converter), str(model), "--outfile", str(made), "--outtype", out_type]
        run = subprocess.run(
            [*command, "--model-name", name], capture_output=True, text=True, errors="replace", check=False
        )
        if run.returncode != 0 or not made.is_file():
            raise UserError(f"{converter} failed: {_reason(run.stderr)}")
        report = _read_back(made, path)
        made.replace(path)
    return report


def _model_folder(source: str) -> Path | None:
    """The folder of a plain model that is there already; None where an adapter has to be merged."""
    root = builtin_model(source) if source.startswith(PREFIX) else Path(source)
    for folder in (root, root / "merged", root / "model"):
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    return None


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "it gave no reason"
    if missing := re.search(r"No module named '([\w.]+)'", last):
        return f"it needs the package {missing[1]}; install what it needs with: pip install 'diablo-peft[export]'."
    return f"{last} Is llama.cpp new enough for the model?"


def _read_back(made: Path, path: Path) -> GgufReport:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(made)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field is not None else "unknown"
        sizes = [int(tensor.n_elements) for tensor in reader.tensors]
    except Exception as error:  # what a damaged file does to the reader is open-ended
        raise UserError(f"The GGUF file cannot be read back: {type(error).__name__}: {error}.") from None
    if not sizes:
        raise UserError(f"The converter wrote a GGUF file without tensors; {path} is not written.")
    return GgufReport(path, architecture, len(sizes), sum(sizes), made.stat().st_size)
