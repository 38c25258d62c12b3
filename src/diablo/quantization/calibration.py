"""Text whose activations say which directions of a weight matter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diablo.data.general_text import BUILTIN_TEXT, read_texts
from diablo.errors import UserError, did_you_mean
from diablo.tasks import TASKS, check_folder, check_split, get_task

if TYPE_CHECKING:
    import torch


def calibration_rows(
    source: str, tokenizer: Any, *, rows: int = 128, length: int = 512, seed: int = 0, folder: Path | None = None
) -> torch.Tensor:
    """Rows of tokens for calibration. The texts are shuffled, joined and cut into rows.

    Args:
        source: a ``.txt`` file of paragraphs between empty lines; a ``.jsonl`` file of objects with a ``text``; the
            name of a task, whose training rows are taken; or ``"builtin"``.
        tokenizer: a transformers tokenizer.
        rows: how many rows at most.
        length: tokens of each row.
        seed: seed of the shuffling.
        folder: a local folder of the tasks' datasets, which is read in place of the hub.

    Returns:
        Token ids ``(rows, length)``, int64. There are fewer rows where there is less text.

    Raises:
        UserError: there is no such text, or less than one row of it.
    """
    # The check below is to need no torch.
    import torch

    texts = _texts(source, folder)
    random.Random(f"calibration-{seed}").shuffle(texts)
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= rows * length:
            break
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    count = min(rows, len(tokens) // length)
    if not count:
        raise UserError(
            f"--calibration: {source} holds {len(tokens)} tokens, less than one row of {length}; give more text, or "
            "lower --length."
        )
    return torch.tensor(tokens[: count * length]).view(count, length)


def check_calibration(source: str, folder: Path | None = None) -> None:
    """Check what calibration text is to be taken from, before it is read.

    Args:
        source: as for :func:`calibration_rows`.
        folder: a local folder of the tasks' datasets.

    Raises:
        UserError: there is no such file or task, or the folder would not be read from.
    """
    if source in TASKS:
        check_split("--calibration", source, "train")
        if folder is not None:
            check_folder("--data-folder", folder, [source])
        return
    if source != BUILTIN_TEXT and not (source.endswith((".txt", ".jsonl")) and Path(source).is_file()):
        raise UserError(
            f"--calibration: found {source!r}; give a .txt or .jsonl file, the name of a task with a train split, or "
            f"builtin.{did_you_mean(source, TASKS)}"
        )
    if folder is not None:
        raise UserError(f"--data-folder: found {str(folder)!r}, from which {source} reads nothing; leave it out.")


def _texts(source: str, folder: Path | None) -> list[str]:
    check_calibration(source, folder)
    if source in TASKS:
        return [f"{each.row.prompt}{each.row.completion}" for each in get_task(source, folder=folder).problems("train")]
    return read_texts(source)
