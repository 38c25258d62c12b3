"""The versions of the formats that adapters and runs are written in: what an older diablo wrote is read, for good.

A number goes up when a diablo of before would read the files wrongly. Files without a number are of version 1.
"""

from __future__ import annotations

from typing import Any

from diablo._version import __version__
from diablo.errors import shortened

FORMAT_KEY = "format_version"
"""The key of the number in ``adapter_config.json``, ``run.json`` and the manifests of checkpoints."""

ADAPTER_FORMAT = 1
"""The format of DiaBlo adapters: the settings in ``adapter_config.json``, and the names and layout of tensors."""

RUN_FORMAT = 1
"""The format of a run's folder: its record, its files and its checkpoints."""


def format_fault(version: Any, newest: int) -> str | None:
    """Why files of a format cannot be read; None where they can.

    Args:
        version: the number in the file; None where it has none.
        newest: the newest format of these files that this version of diablo reads.
    """
    if version is None:
        return None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        return f"{FORMAT_KEY}={shortened(version)} must be a whole number from 1 on, as saving writes it"
    if version > newest:
        return (
            f"{FORMAT_KEY}={version} is newer than diablo {__version__} reads, which is up to {newest}; upgrade it "
            "with: pip install --upgrade diablo-peft"
        )
    return None
